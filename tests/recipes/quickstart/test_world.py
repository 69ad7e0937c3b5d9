"""The quickstart world: rules by hand, files as written, resuming."""

import json
from collections import Counter

import decord
import numpy as np
import pytest

from recipes.quickstart import texts, world
from rl.errors import DataError

RED, GREEN, BLUE = range(3)


def decode(path):
    return decord.VideoReader(str(path), num_threads=1).get_batch(range(16)).asnumpy()


def test_each_colour_moves_the_ball_its_own_way():
    for colour, after in ((RED, [2, 0]), (GREEN, [2, 1]), (BLUE, [2, 2])):
        board = np.full((4, 4), colour)
        assert world.follow(board, (1, 1), 2).tolist() == [[1, 1], after]


def test_a_path_followed_by_hand_crosses_the_edges():
    board = np.array(
        [
            [RED, GREEN, BLUE, GREEN],
            [GREEN, GREEN, GREEN, BLUE],
            [BLUE, RED, GREEN, RED],
            [GREEN, BLUE, RED, BLUE],
        ]
    )
    # red at (0,0): down-left over the left edge; blue at (1,3): over the right edge; at (3,1) over
    # the bottom edge
    by_hand = [[0, 0], [1, 3], [2, 0], [3, 1], [0, 2], [1, 3], [2, 0], [3, 1]]
    assert world.follow(board, (0, 0)).tolist() == by_hand


def test_clips_depend_on_seed_split_and_index_alone():
    clip, same = world.draw_clip(0, "rl", 5), world.draw_clip(0, "rl", 5)
    assert (
        (clip.board == same.board).all()
        and (clip.path == same.path).all()
        and clip.template == same.template
    )
    others = [
        world.draw_clip(1, "rl", 5),
        world.draw_clip(0, "held_out", 5),
        world.draw_clip(0, "rl", 6),
    ]
    assert all((clip.board != other.board).any() for other in others)


def test_answers_and_templates_are_balanced():
    clips = [world.draw_clip(0, "held_out", index) for index in range(1024)]
    answers = Counter(clip.answer for clip in clips)
    assert sorted(answers) == list("ABCD") and all(200 < count < 312 for count in answers.values())
    assert 440 < sum(clip.template for clip in clips) < 584
    assert len({clip.board.tobytes() for clip in clips}) == 1024


def test_rendering_shows_tiles_and_ball():
    clip = world.draw_clip(3, "train", 0)
    frames = world.render(clip.board, clip.path)
    assert frames.shape == (8, 32, 32, 3) and frames.dtype == np.uint8
    assert (
        frames[:, ::8, ::8] == world.PALETTE[clip.board]
    ).all()  # the ball leaves the tiles' corners free
    centres = (frames[:, 3::8, 3::8] == 255).all(-1)
    for state, (row, column) in enumerate(clip.path):
        assert np.argwhere(centres[state]).tolist() == [[row, column]]


def test_a_written_split_holds_what_its_manifest_says(tmp_path):
    manifest = world.write_world(tmp_path, "validation", 6, seed=7)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert manifest == tmp_path / "validation.jsonl"
    assert [row["id"] for row in rows] == [f"validation-{n:05d}" for n in range(1, 7)]
    for row in rows:
        frames = decode(manifest.parent / row["video"])
        board, path = np.array(row["board"]), np.array(row["path"])
        drawn = world.render(board, path).repeat(2, axis=0)
        assert frames.shape == (16, 32, 32, 3)
        assert np.abs(frames.astype(int) - drawn).max() <= 2
        colours = np.abs(frames[0, ::8, ::8, None].astype(int) - world.PALETTE).sum(-1).argmin(-1)
        assert (colours == board).all()
        brightest = frames[::2, 3::8, 3::8].min(-1).reshape(8, 16).argmax(-1)
        assert np.stack(np.divmod(brightest, 4), 1).tolist() == row["path"]
        assert (world.follow(board, path[0]) == path).all()
        assert row["answer"] == "ABCD"[path[-1, 1]] and row["options"] == list("ABCD")
        assert row["question"] == texts.QUESTIONS[row["template"]]
        assert row["frames"] == [0, 1, 2, 3] and row["imagine"] == [list(range(2, 16))]


def test_the_time_of_a_frame_is_half_a_second(tmp_path):
    world.write_world(tmp_path, "train", 1, seed=0)
    reader = decord.VideoReader(str(tmp_path / "train/00001.mp4"))
    assert reader.get_avg_fps() == 2.0
    assert reader.get_frame_timestamp([0, 1, 15])[:, 0].tolist() == [0.0, 0.5, 7.5]


def test_an_interrupted_split_is_finished_and_a_complete_one_left_alone(tmp_path):
    manifest = world.write_world(tmp_path, "rl", 5, seed=0)
    text, clips = manifest.read_text(), tmp_path / "rl"
    kept, lost = clips / "00001.mp4", clips / "00003.mp4"
    whole = lost.read_bytes()
    manifest.unlink()
    lost.unlink()
    (clips / "00003.part").write_bytes(whole[:100])  # killed while writing it
    stamp = kept.stat().st_mtime_ns
    calls = []
    world.write_world(
        tmp_path, "rl", 5, seed=0, progress=lambda done, total: calls.append((done, total))
    )
    assert manifest.read_text() == text and lost.read_bytes() == whole
    assert kept.stat().st_mtime_ns == stamp and calls[-1] == (5, 5)

    stamps = {path: path.stat().st_mtime_ns for path in [manifest, *clips.glob("*.mp4")]}
    world.write_world(tmp_path, "rl", 5, seed=0)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_longer_split_begins_with_the_shorter_one_and_another_seed_starts_over(tmp_path):
    short = world.write_world(tmp_path, "train", 2, seed=0).read_text()
    assert world.write_world(tmp_path, "train", 3, seed=0).read_text().startswith(short)
    first = decode(tmp_path / "train/00001.mp4")
    assert not world.write_world(tmp_path, "train", 2, seed=1).read_text().startswith(short)
    assert (decode(tmp_path / "train/00001.mp4") != first).any()
    assert len(list((tmp_path / "train").glob("*.mp4"))) == 2


def test_a_split_killed_before_its_first_clip_is_taken_up_again(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/source.part").write_text("{")
    assert world.write_world(tmp_path, "train", 1, seed=0).exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    precious = tmp_path / "train" / "holiday.mp4"
    precious.parent.mkdir()
    precious.write_bytes(b"mine")
    with pytest.raises(DataError, match="choose another folder"):
        world.write_world(tmp_path, "train", 1, seed=0)
    assert precious.read_bytes() == b"mine"
