"""The world of balls: physics by hand, clips as drawn and written, what is asked and taught."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest
import torch

from benchmarks.latents_for import SETTINGS, taught
from recipes.quickstart import balls, texts, world
from recipes.quickstart.checkpoint import make_tokenizer
from recipes.quickstart.perception import Perception
from recipes.quickstart.worlds import Words
from rl.data.manifest import read_manifest
from rl.sft.taught import taught_texts

RED, GREEN, BLUE = range(3)


# Of three balls in the two frames of a state, (row, column) in pixels.
CENTRES = (((4, 4), (4, 6)), ((12, 28), (14, 28)), ((28, 12), (28, 10)))
LEFT, RIGHT, UP, DOWN = [0, -1], [0, 1], [-1, 0], [1, 0]


def fly(balls_at: list[tuple[list[int], list[int]]], states: int) -> tuple[list, list]:
    places, velocities = (np.array(part) for part in zip(*balls_at, strict=True))
    path, moves = balls.fly(places, velocities, states)
    return path.tolist(), moves.tolist()


def test_walls_turn_a_ball_back() -> None:
    path, moves = fly([([2, 2], RIGHT)], 4)
    assert path == [[[2, 2]], [[2, 3]], [[2, 2]], [[2, 1]]]
    assert moves == [[RIGHT], [RIGHT], [LEFT], [LEFT]]
    assert fly([([0, 1], UP)], 2)[0] == [[[0, 1]], [[1, 1]]]


def test_a_head_on_collision_turns_both_balls_back() -> None:
    path, moves = fly([([1, 0], RIGHT), ([1, 2], LEFT)], 3)
    assert path == [[[1, 0], [1, 2]], [[1, 1], [1, 1]], [[1, 0], [1, 2]]]
    assert moves == [[RIGHT, LEFT], [LEFT, RIGHT], [LEFT, RIGHT]]


def test_balls_that_meet_at_a_right_angle_go_on_with_each_others_velocity() -> None:
    path, moves = fly([([1, 0], RIGHT), ([2, 1], UP)], 3)
    assert path == [[[1, 0], [2, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 2]]]
    assert moves[1] == [UP, RIGHT]


def test_of_three_each_takes_the_velocity_of_the_next() -> None:
    path, moves = fly([([1, 0], RIGHT), ([2, 1], UP), ([1, 2], LEFT)], 2)
    assert path[1] == [[1, 1]] * 3 and moves[1] == [UP, LEFT, RIGHT]


def test_energy_and_momentum_are_kept_where_there_is_no_wall() -> None:
    collisions = 0
    for index in range(60):
        clip = balls.draw_clip(0, "rl", index)
        assert ((clip.velocities**2).sum(-1) == 1).all()
        assert (np.diff(clip.places, axis=0) != 0).sum(-1).tolist() == [[1] * 3] * 7  # one tile
        before = np.diff(clip.places, axis=0)  # with which the balls arrive
        # Leaving with what they arrived with, in all: collisions only hand velocities on.
        assert (before.sum(1) == clip.velocities[1:].sum(1)).all()
        collisions += int(balls.collides(clip.places[1:], clip.ball).sum())
    assert collisions >= 60


def test_clips_depend_on_seed_split_and_index_alone() -> None:
    def drawn(seed: int, split: str, index: int) -> list:
        return [balls.draw_clip(seed, split, index + more).cells.tolist() for more in range(3)]

    assert drawn(0, "rl", 5) == drawn(0, "rl", 5)
    assert drawn(0, "rl", 5)[1:] == drawn(0, "rl", 6)[:2]
    for other in (drawn(0, "train", 5), drawn(1, "rl", 5)):
        assert other != drawn(0, "rl", 5)


def test_answers_balls_and_turns_are_balanced_and_flying_straight_on_is_no_answer() -> None:
    clips = [balls.draw_clip(1, "held_out", index) for index in range(160)]
    answers = Counter(clip.answer for clip in clips)
    assert sorted(answers) == list("ABCD") and min(answers.values()) > 20
    assert min(Counter(clip.ball for clip in clips).values()) > 35
    stays = straight = 0
    for clip in clips:
        mine, velocity = clip.places[:, clip.ball], clip.velocities[1, clip.ball]
        alone, _ = balls.fly(mine[1:2], velocity[None], balls.STATES - 1)
        quarters = [(place // 2).tolist() for place in (mine[1], alone[-1, 0], mine[-1])]
        stays += quarters[0] == quarters[2]
        straight += quarters[1] == quarters[2]
    assert 20 < stays < 60 and 20 < straight < 60  # a quarter of them


def test_no_held_out_path_is_trained_on() -> None:
    def paths(split: str) -> set[bytes]:
        clips = [balls.draw_clip(0, split, index) for index in range(400)]
        return {clip.places.tobytes() for clip in clips}

    trained, held_out = paths("train"), paths("held_out")
    assert len(paths("rl") & trained) > 0  # it could have happened
    assert not held_out & trained and len(held_out) > 350


def test_rendering_shows_where_balls_are_and_where_they_head() -> None:
    places = np.array([[[0, 0], [1, 3], [3, 1]]])
    clip = balls.Clip(places, np.array([[RIGHT, DOWN, LEFT]]), ball=RED)
    frames = balls.render(clip)
    assert frames.shape == (2, 32, 32, 3) and frames.dtype == np.uint8
    for ball, (first, then) in enumerate(CENTRES):
        for frame, (row, column) in zip(frames, (first, then), strict=True):
            lit = np.argwhere(frame[..., ball] > 0)
            assert lit.mean(0) + 0.5 == pytest.approx([row, column])
            assert np.abs(lit + 0.5 - [row, column]).max() <= balls.RADIUS + 0.5
            assert frame[row, column, ball] == 255


def test_a_written_split_is_read_as_a_manifest_and_begins_a_longer_one(tmp_path: Path) -> None:
    short = balls.write_balls(tmp_path, "train", 2, seed=0).read_text()
    manifest = balls.write_balls(tmp_path, "train", 3, seed=0)
    assert manifest.read_text().startswith(short)
    for index, sample in enumerate(read_manifest(manifest)):
        clip = balls.draw_clip(0, "train", index)
        frames = decord.VideoReader(sample.video, num_threads=1).get_batch(range(16)).asnumpy()
        assert np.abs(frames.astype(int) - balls.render(clip)).max() <= 2
        assert sample.frames == (0, 1, 2, 3) and sample.imagine == (tuple(range(2, 16)),)
        assert sample.answer == clip.answer and sample.question == balls.QUESTIONS[clip.ball]
        row, column = clip.places[-1, clip.ball] // 2
        assert clip.answer == "ABCD"[2 * row + column]
        assert sample.extra["cells"] == (clip.places @ [4, 1]).tolist()


def row() -> dict:
    """A clip by hand: green goes along the top row, the others rest."""
    cells = [[5, column // 2, 15] for column in range(8)]
    return {"cells": cells, "ball": GREEN, "imagine": [[2, 3]], "answer": "B", "video": "a.mp4"}


def test_what_variants_write() -> None:
    setting, path = SETTINGS["balls"], "r1c1 r1c2 r1c2 r1c3 r1c3 r1c4 r1c4"
    assert taught(row(), "latents", setting) == row()
    assert taught(row(), "direct", setting) == row() | {"imagine": []}
    assert taught(row(), "text", setting)["reasoning"] == [f" where {path} read"]
    assert taught(row(), "pause", setting)["reasoning"] == [" next" * 9]
    every = " ".join(f"r2c2 r4c4 {cell}" for cell in path.split())
    assert taught(row(), "text_all", setting)["reasoning"] == [f" where {every} read"]
    tiles = world.manifest_row(world.draw_clip(0, "train", 0), "train", 0)
    words = " ".join(texts.cell(*place) for place in tiles["path"][1:])
    chain = taught(tiles, "text", SETTINGS["tiles"])["reasoning"]
    assert chain == [f" where {words} read"]


@pytest.mark.parametrize("variant", ["text", "pause"])
def test_words_take_as_many_steps_as_latents(variant: str, tmp_path: Path) -> None:
    balls.write_balls(tmp_path, "train", 1, seed=0)
    line = json.loads((tmp_path / "train.jsonl").read_text())
    chosen = tmp_path / "chosen.jsonl"
    chosen.write_text(json.dumps(taught(line, variant, SETTINGS["balls"])))
    (text,) = taught_texts(
        read_manifest(chosen)[0],
        0,
        answer_template="<answer>{answer}</answer>",
        reasoning_template="{reasoning}",
        tokenizer=make_tokenizer(balls.BALLS),
    )
    latents = len(line["imagine"][0]) // balls.FRAMES_PER_STATE
    assert len(text) - 3 == latents + 2  # the answer and its tags; start and end of the span


def test_questions_and_answers_are_true() -> None:
    tokenizer = make_tokenizer(balls.BALLS)
    latent = tokenizer(" next", add_special_tokens=False)["input_ids"][0]  # stands for a latent
    words = Words.of(tokenizer, latent, balls.BALLS)
    cells = torch.stack([torch.tensor(balls.draw_clip(0, "rl", i).cells) for i in range(4)])
    generator = torch.Generator().manual_seed(0)
    questions = balls.ask({"cells": cells}, words, Perception(reads=2), generator)
    names = balls.cells()

    def told(row: int, state: int) -> list[str]:
        where = (names[cell] for cell in cells[row, state].tolist())
        return [word for pair in zip(balls.BALLS_WORDS, where, strict=True) for word in pair]

    for row in range(4):
        expected = ["where", *told(row, 1)]
        for state in questions.states[row].tolist():
            expected += ["read", "next", *told(row, state), "next", "next", *told(row, state + 1)]
        said = str(tokenizer.decode(questions.ids[row])).split()
        assert said == expected
        answers = [said[i] for i in questions.asked.tolist()]
        assert all(answer in names for answer in answers) and len(answers) == 15
    assert questions.tasks == ("where",) * 3 + (("read",) * 3 + ("next",) * 3) * 2
