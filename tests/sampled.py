"""Opens and samples videos with the fields of `Sampling` as keywords, as tests of single settings like to say them."""

from dataclasses import fields

from videoxl import frame_sampling_videoxl, video_processing_videoxl
from videoxl.frame_sampling_videoxl import Sampling

_FIELDS = {field.name for field in fields(Sampling)}


def open_video(source, **options):
    sampling = Sampling(**{name: options.pop(name) for name in list(options) if name in _FIELDS})
    return video_processing_videoxl.open_video(source, sampling=sampling, **options)


def sample_frame_indices(num_frames, fps, **settings):
    return frame_sampling_videoxl.sample_frame_indices(num_frames, fps, Sampling(**settings))


def choose_frames(times, duration, frame_rate=None, **settings):
    return frame_sampling_videoxl.choose_frames(times, duration, frame_rate, Sampling(**settings))


def choose_numbered_frames(num_frames, fps, **settings):
    return frame_sampling_videoxl.choose_numbered_frames(num_frames, fps, Sampling(**settings))


def sample_frame_times(times, frame_rate=None, **settings):
    """The frames of a whole video whose last frame lasts for the mean interval."""
    mean = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / (frame_rate or 1)
    return choose_frames(times, times[-1] + mean, frame_rate, **settings).indices
