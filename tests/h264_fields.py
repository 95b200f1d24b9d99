"""Field-coded H.264, which no encoder at hand makes: each field a slice of raw macroblocks (I_PCM), 64 x 64."""

import numpy as np

DELIMITER = b"\0\0\0\1\x09\x10"  # in front of a picture or field in a stream
_PICTURES = 12  # from one IDR picture to the next


class _Bits:
    def __init__(self):
        self.bits = ""

    def flags(self, bits):
        self.bits += bits
        return self

    def numbers(self, *values):
        """Exp-Golomb codes."""
        for value in values:
            code = format(value + 1, "b")
            self.bits += "0" * (len(code) - 1) + code
        return self

    def align(self):
        self.bits += "0" * (-len(self.bits) % 8)
        return self

    def unit(self, kind):
        self.flags("1").align()
        data = bytearray()
        for byte in int(self.bits, 2).to_bytes(len(self.bits) // 8, "big"):
            if byte < 4 and data[-2:] == b"\0\0":
                data.append(3)
            data.append(byte)
        return b"\0\0\0\1" + bytes([kind]) + bytes(data)


def _parameters():
    sequence = _Bits().flags(f"{77:08b}{0:08b}{30:08b}").numbers(0, 0, 2, 2).flags("0").numbers(3, 1).flags("00101")
    sequence.flags("00001" + f"{1:032b}{50:032b}" + "10000")  # 25 pictures a second, 50 fields
    pictures = _Bits().numbers(0, 0).flags("00").numbers(0, 0, 0).flags("000").numbers(0, 0, 0).flags("000")
    return sequence.unit(0x67) + pictures.unit(0x68)


def _field(number, bottom, luma):
    key = not bottom and number % _PICTURES == 0
    bits = _Bits().numbers(0, 7, 0).flags(f"{number % _PICTURES:04b}1{bottom}")
    if key:
        bits.numbers(number // _PICTURES % 2).flags("00")
    else:
        bits.flags("0")
    bits.numbers(0)
    for top in (0, 16):
        for left in (0, 16, 32, 48):
            levels = luma[top : top + 16, left : left + 16].flatten().tolist() + [128] * 128
            bits.numbers(25).align().flags("".join(format(level, "08b") for level in levels))
    return bits.unit(0x65 if key else 0x61)


def fields(count, picture):
    """Yields (top field, bottom field) as bytes; `picture(number)` is uint8 [64, 64] of levels from 16 to 235."""
    for number in range(count):
        luma = np.asarray(picture(number))
        first = _parameters() if number % _PICTURES == 0 else b""
        yield first + _field(number, 0, luma[0::2]), _field(number, 1, luma[1::2])
