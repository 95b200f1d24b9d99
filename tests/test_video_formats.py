"""A file is read for what it is and never leads to another one, whatever it holds and whatever it is called."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from sampled import open_video
from test_video_processing import EVERY_FRAME, THIRTIETHS, numbered_picture, read, write_clip
from videoxl import video_decoding_videoxl as vd
from videoxl import video_index_videoxl as vi
from videoxl import video_processing_videoxl as vp

TARGET = "target.ts"
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"
DASH = """<?xml version="1.0"?>
<!-- a manifest -->
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"><Period><AdaptationSet
mimeType="video/mp4"><Representation id="1" bandwidth="9"><BaseURL>{address}</BaseURL></Representation></AdaptationSet>
</Period></MPD>
"""
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n# {address}\n"
PLAYLISTS = {
    "hls": HLS,
    "hls of playlists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\n{address}\n",
    "m3u": "#EXTM3U\n{address}\n",
    "with a byte order mark": "\ufeff" + HLS,
    "ffconcat": "ffconcat version 1.0\nfile '{address}'\n",
    "dash": DASH,
    "smooth": '<SmoothStreamingMedia MajorVersion="2"/><!-- {address} -->',
    "asx": '<ASX version="3.0"><entry><ref href="{address}"/></entry></ASX>',
    "pls": "[playlist]\nFile1={address}\n",
    "sdp": SDP,
}
# Containers and raw streams that are read, by the encoder that makes one.
READ = {
    **dict.fromkeys(("a.mp4", "a.mov", "a.mkv", "a.ts", "a.flv", "a.h264"), "libx264"),
    **dict.fromkeys(("a.avi", "a.3gp", "a.m4v", "a.nut"), "mpeg4"),
    **dict.fromkeys(("a.mpg", "a.vob", "a.m2v", "a.mxf"), "mpeg2video"),
    **{"a.wmv": "wmv2", "a.asf": "msmpeg4", "a.hevc": "libx265", "a.mjpeg": "mjpeg"},
    **dict.fromkeys(("a.webm", "a.ogg", "a.ivf"), "libvpx"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a video that playlists can name, as working folder; playlists lie in `lists`."""
    monkeypatch.chdir(tmp_path)
    write_clip(TARGET, THIRTIETHS[:8])
    os.mkdir("lists")
    return tmp_path


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_refused_whatever_they_are_called(folder, kind):
    for address in (f"{folder}/{TARGET}", f"file://{folder}/{TARGET}", f"../{TARGET}"):
        for name in ("a.m3u8", "a.mp4", "a.txt", "a.mpd", "a.png", "a"):
            path = f"lists/{name}"
            with open(path, "w", encoding="utf-8") as file:
                file.write(PLAYLISTS[kind].format(address=address))
            with pytest.raises(vp.VideoDecodeError, match="names other files.*Give the video file itself") as caught:
                open_video(path, size=8)
            assert path in str(caught.value) and address not in str(caught.value)


def test_the_list_of_formats_holds_where_a_text_says_nothing_of_itself(folder):
    """What stands in front of the mark makes it another text, for FFmpeg as for the look at its beginning."""
    for text in (f"\0\n#EXTM3U\n{TARGET}\n", f"# x\nffconcat version 1.0\nfile '../{TARGET}'\n"):
        (folder / "lists" / "a.m3u8").write_text(text)
        with pytest.raises(vp.VideoDecodeError, match="expected a video file"):
            open_video("lists/a.m3u8", size=8)


def test_ffmpeg_itself_refuses_formats_that_are_not_on_the_list(folder, monkeypatch):
    monkeypatch.setattr(vi, "PLAYLISTS", {})  # as if a text had got past the look at its beginning
    for name, text in (("a.m3u8", HLS), ("a.mp4", PLAYLISTS["ffconcat"]), ("a.sdp", SDP)):
        (folder / "lists" / name).write_text(text.format(address=f"{folder}/{TARGET}"))
        with pytest.raises(vp.VideoDecodeError, match="not read here.*Give the video file itself"):
            open_video(f"lists/{name}", size=8)


def test_no_other_backend_gets_a_playlist(folder, monkeypatch):
    class Decord:
        def __getattr__(self, name):
            raise AssertionError("decord was asked")

    monkeypatch.setattr(vd, "decord", Decord())
    (folder / "lists" / "a.mp4").write_text(HLS.format(address=f"../{TARGET}"))
    with pytest.raises(vp.VideoDecodeError, match="playlist"):
        open_video("lists/a.mp4", size=8, backend="decord")


def test_chat_and_processor_inherit_it(folder, model, tokenizer, processor):
    (folder / "lists" / "a.m3u8").write_text(HLS.format(address=f"../{TARGET}"))
    with pytest.raises(ValueError, match="playlist"):
        model.encode_video("lists/a.m3u8", tokenizer)
    message = {"role": "user", "content": [{"type": "video", "video": "lists/a.m3u8"}, {"type": "text", "text": "?"}]}
    with pytest.raises(ValueError, match="playlist"):
        processor.apply_chat_template([message], tokenize=True, return_dict=True)


def _box(data: bytes, *names: bytes) -> list[int]:
    """Where nested boxes of an MP4 begin."""
    start, places = 0, []
    for name in names:
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
        places.append(start)
        start += 8
    return places


def _alias(name: str) -> bytes:
    """A data reference to a file beside this one, as QuickTime wrote them."""
    path = f"disk:{name}".encode()
    path += b"\0" * (len(path) % 2)
    record = struct.pack(">10xB27s12xB63s16xHH16x", 4, b"disk", len(name), name.encode(), 1, 1)
    record += struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    return struct.pack(">I4sI", len(record) + 12, b"alis", 0) + record


def test_a_movie_whose_pictures_lie_in_another_file(folder):
    write_clip("target.mov", THIRTIETHS[:8])
    data = bytearray((folder / "target.mov").read_bytes())
    places = _box(data, b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    alias, entry = _alias("target.mov"), places[-1] + 16
    data[entry : entry + 12] = alias
    for place in places:
        data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + len(alias) - 12).to_bytes(4, "big")
    (folder / "a.mov").write_bytes(data)
    with av.open("a.mov", options={"enable_drefs": "1"}) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 8, "the reference leads somewhere"
    with pytest.raises(vp.VideoDecodeError, match="another file"):
        open_video("a.mov", size=8)


@pytest.mark.parametrize("name", READ)
def test_what_is_read(folder, name):
    def setup(stream):
        if READ[name] in ("wmv2", "msmpeg4", "mjpeg"):
            stream.codec_context.max_b_frames = 0
        if READ[name] == "mjpeg":
            stream.pix_fmt = "yuvj420p"

    clip = write_clip(name, range(8), codec=READ[name], base=Fraction(1, 30), setup=setup)
    assert read(clip, **EVERY_FRAME)[1] == list(range(8))


def test_pictures_that_are_given_as_videos(folder):
    for name in ("a.png", "a.bmp", "a.jpg", "a.gif", "a.tga", "a.ppm", "a%03d.png", "a*.png", "a.y.png"):
        Image.fromarray(numbered_picture(7)).save(name)
        assert read(name)[1] == [7], name


def test_planes_in_three_files_are_not_put_together(folder):
    for suffix in "YUV":
        np.zeros((288, 352) if suffix == "Y" else (144, 176), np.uint8).tofile(f"a.{suffix}")
    with pytest.raises(vp.VideoDecodeError, match="not read here"):
        open_video("a.Y", size=8)
    write_clip("b.mp4", THIRTIETHS[:4])
    os.rename("b.mp4", "b.y")
    assert read("b.y", **EVERY_FRAME)[1] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name",
    [
        *("concat:a.mp4|b.mp4", "subfile,,start,0,end,0,,:a.mp4", "data:video,a.mp4", "pipe:0", "fd:0", "file:a.mp4"),
        *("crypto:a.mp4", "cache:a.mp4", "C:a.mp4", "lecture 12:30.mp4", "tcp:a?listen", "a%03d.mp4", "-i", "a#1.mp4"),
    ],
)
def test_names_are_only_names(folder, name):
    with pytest.raises(FileNotFoundError):
        open_video(name, size=8)
    os.rename(write_clip("a.mp4", THIRTIETHS[:4]), name)
    assert read(name, **EVERY_FRAME)[1] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.m4a", "a.aac", "a.aiff", "a.mka"])
def test_sound_is_said_to_be_sound(folder, name):
    with av.open(name, "w") as output:
        stream = output.add_stream(output.default_audio_codec if name != "a.mka" else "aac", rate=16000)
        stream.layout = "mono"
        resampler = av.AudioResampler(stream.format, "mono", 16000, stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), layout="mono")
        frame.sample_rate = 16000
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(piece))
        output.mux(stream.encode())
    with pytest.raises(vp.VideoDecodeError, match="audio file"):
        open_video(name, size=8)
