"""Videos come back from their files as they were written."""

from __future__ import annotations

import math

import av
import pytest
import torch
from videos import read_video

from turbocompile.errors import UnsupportedError
from turbocompile.video import file as video


def smooth_clip(frames: int = 9, height: int = 64, width: int = 96) -> torch.Tensor:
    """Slowly moving colour gradients: what 4:2:0 loses of them is little."""
    t = torch.linspace(0, 1, frames).reshape(-1, 1, 1)
    y = torch.linspace(0, 1, height).reshape(1, -1, 1)
    x = torch.linspace(0, 1, width).reshape(1, 1, -1)
    red = 0.5 + 0.4 * torch.sin(3 * x + 2 * t) + 0 * y
    green = 0.5 + 0.4 * torch.cos(3 * y + 2 * t) + 0 * x
    blue = 0.2 + 0.5 * x * y + 0.2 * t
    return (torch.stack([red, green, blue], dim=-1) * 255).round().to(torch.uint8)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / float((a.double() - b.double()).square().mean()))


def test_round_trip_keeps_frames_rate_size_and_colours(tmp_path):
    clip = smooth_clip()
    path = video.write_video(tmp_path / "clip.mp4", clip)
    found, fps = read_video(path)
    assert found.shape == clip.shape
    assert fps == 16
    # Rounding to 8-bit limited-range YUV and back costs about 1 level rms (48 dB) and x264 at crf 18 about 2 (42 dB);
    # another colour matrix in one direction costs 10 levels (28 dB).
    assert psnr(found, clip) > 38
    for channel in range(3):
        assert psnr(found[..., channel], clip[..., channel]) > 36


def test_file_is_h264_420_and_says_its_colours(tmp_path):
    if "libx264" not in av.codecs_available:
        pytest.skip("this build of PyAV has no x264")
    path = video.write_video(tmp_path / "clip.mp4", smooth_clip())
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (96, 64)
        assert (int(context.colorspace), int(context.color_range)) == (video.BT709, video.LIMITED_RANGE)
        assert container.duration / av.time_base == pytest.approx(9 / 16, abs=0.01)


def test_green_has_the_luma_of_bt709(tmp_path):
    """16 + 219 * 0.7152 = 172.6; BT.601, which FFmpeg takes by default, has 16 + 219 * 0.587 = 144.6."""
    green = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    green[..., 1] = 255
    with av.open(str(video.write_video(tmp_path / "green.mp4", green))) as container:
        plane = next(container.decode(video=0)).to_ndarray()[:32]
    assert plane.mean() == pytest.approx(172.6, abs=2)


def test_without_x264_the_file_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "ENCODERS", video.ENCODERS[1:])
    found, fps = read_video(video.write_video(tmp_path / "clip.mp4", smooth_clip()))
    assert (found.shape, fps) == (smooth_clip().shape, 16)
    assert psnr(found, smooth_clip()) > 34  # quantizer 2 costs 2 to 4 levels rms


def test_one_frame_is_a_video(tmp_path):
    found, _ = read_video(video.write_video(tmp_path / "one.mp4", smooth_clip(1)))
    assert found.shape == (1, 64, 96, 3)


def test_equal_frames_make_equal_files(tmp_path):
    one, two = (video.write_video(tmp_path / name, smooth_clip()).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert one == two


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = video.write_video(tmp_path / "clip.mp4", smooth_clip())
    before = path.read_bytes()

    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_encode", broken)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(path, smooth_clip(3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_missing_folders_are_made_and_files_are_readable(tmp_path):
    path = video.write_video(tmp_path / "a" / "b" / "clip.mp4", smooth_clip(2))
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("name", "frames", "sentence"),
    [
        ("clip.gif", smooth_clip(1), "written as .mp4"),
        ("clip.mp4", smooth_clip(1, 63, 96), "must be even"),
        ("clip.mp4", smooth_clip(1).float(), "frames are uint8"),
        ("clip.mp4", smooth_clip(1)[:0], "frames are uint8"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, frames, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        video.write_video(tmp_path / name, frames)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_video(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(UnsupportedError, match="is a folder"):
        video.write_video(tmp_path / "x.mp4", smooth_clip(1))


def test_png_frames_are_exact(tmp_path):
    from PIL import Image

    clip = smooth_clip(3)
    paths = video.write_frames(tmp_path / "frames", clip)
    assert [p.name for p in paths] == ["frame-0000.png", "frame-0001.png", "frame-0002.png"]
    for path, frame in zip(paths, clip, strict=True):
        with Image.open(path) as image:
            assert torch.equal(torch.tensor(list(image.getdata()), dtype=torch.uint8).reshape(64, 96, 3), frame)
