"""The world of balls: paths by hand, clips as drawn and written, what is asked and taught."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest
import torch

from benchmarks.latents_for import SETTINGS, drift, main, table, taught
from recipes.quickstart import balls, texts, world
from recipes.quickstart.checkpoint import make_tokenizer
from recipes.quickstart.perception import Perception
from recipes.quickstart.worlds import Words
from rl.data.manifest import read_manifest
from rl.sft.taught import taught_texts

RED, GREEN, BLUE = range(3)


@pytest.mark.parametrize(
    ("columns", "answer"), [((1, 0), "A"), ((1, 2), "B"), ((3, 1), "C"), ((2, 3), "D")]
)
def test_answers_name_the_sides_of_both_balls(columns: tuple[int, int], answer: str) -> None:
    paths = np.array([[[0, column] for column in columns]])
    assert balls.Clip(np.zeros((4, 4), dtype=int), paths).answer == answer


def test_balls_go_where_the_colours_of_their_tiles_say() -> None:
    for index in range(20):
        clip = balls.draw_clip(0, "rl", index)
        for before, after in zip(clip.paths, clip.paths[1:], strict=False):
            for (row, column), place in zip(before, after, strict=True):
                aside = {RED: -1, GREEN: 0, BLUE: 1}[int(clip.board[row, column])]
                assert place.tolist() == [(row + 1) % 4, (column + aside) % 4]


def test_clips_depend_on_seed_split_and_index_alone() -> None:
    def drawn(seed: int, split: str, index: int) -> list:
        return [balls.draw_clip(seed, split, index + more).cells.tolist() for more in range(3)]

    assert drawn(0, "rl", 5) == drawn(0, "rl", 5)
    assert drawn(0, "rl", 5)[1:] == drawn(0, "rl", 6)[:2]
    for other in (drawn(0, "train", 5), drawn(1, "rl", 5)):
        assert other != drawn(0, "rl", 5)


def test_answers_are_balanced_balls_never_meet_and_the_last_state_shown_does_not_tell() -> None:
    clips = [balls.draw_clip(1, "held_out", index) for index in range(400)]
    answers = Counter(clip.answer for clip in clips)
    assert sorted(answers) == list("ABCD") and min(answers.values()) > 75
    assert all((clip.cells[:, 0] != clip.cells[:, 1]).all() for clip in clips)
    stays = sum(
        balls.sides(clip.paths[balls.OBSERVED - 1]) == balls.sides(clip.paths[-1]) for clip in clips
    )
    assert 75 < stays < 140  # about a quarter; the winds of one board pull both balls the same way


def test_no_board_is_drawn_twice() -> None:
    def boards(split: str) -> set[bytes]:
        return {balls.draw_clip(0, split, index).board.tobytes() for index in range(400)}

    trained, held_out = boards("train"), boards("held_out")
    assert len(trained) == len(held_out) == 400 and not trained & held_out


def test_rendering_shows_both_balls_in_halves_of_their_tiles() -> None:
    board = np.zeros((4, 4), dtype=int)
    board[1, 1] = BLUE
    frames = balls.render(balls.Clip(board, np.array([[[1, 1], [1, 1]], [[2, 2], [0, 3]]])))
    assert frames.shape == (2, 32, 32, 3) and frames.dtype == np.uint8
    for frame, (white, black) in zip(frames, [((8, 8), (8, 12)), ((16, 16), (0, 28))], strict=True):
        expected = world.PALETTE[board].repeat(8, axis=0).repeat(8, axis=1)
        for shade, (row, column) in zip((255, 0), (white, black), strict=True):
            expected[row : row + 8, column : column + 4] = shade
        assert (frame == expected).all()


def test_a_written_split_is_read_as_a_manifest_and_begins_a_longer_one(tmp_path: Path) -> None:
    short = balls.write_balls(tmp_path, "train", 2, seed=0).read_text()
    manifest = balls.write_balls(tmp_path, "train", 3, seed=0)
    assert manifest.read_text().startswith(short)
    for index, sample in enumerate(read_manifest(manifest)):
        clip = balls.draw_clip(0, "train", index)
        frames = decord.VideoReader(sample.video, num_threads=1).get_batch(range(16)).asnumpy()
        drawn = balls.render(clip).repeat(2, axis=0).astype(int)
        assert np.abs(frames.astype(int) - drawn).max() <= 2
        assert sample.frames == (0, 1, 2, 3) and sample.imagine == (tuple(range(2, 16)),)
        assert sample.answer == clip.answer and sample.question == balls.QUESTION
        assert sample.extra["cells"] == (clip.paths @ [4, 1]).tolist()
        assert sample.extra["board"] == clip.board.tolist()


def row() -> dict:
    """By hand: white goes along the top row, black along the bottom row."""
    cells = [[column // 2, 12 + column // 2] for column in range(8)]
    return {"cells": cells, "imagine": [[2, 3]], "answer": "B", "video": "a.mp4"}


def test_what_variants_write() -> None:
    setting = SETTINGS["balls"]
    assert taught(row(), "latents", setting) == row()
    assert taught(row(), "direct", setting) == row() | {"imagine": []}
    some = "r1c1 r1c2 r4c2 r1c3 r4c3 r1c4 r4c4"
    assert taught(row(), "text", setting)["reasoning"] == [f" where {some} read"]
    assert taught(row(), "pause", setting)["reasoning"] == [" next" * 9]
    every = "r1c1 r4c1 r1c2 r4c2 r1c2 r4c2 r1c3 r4c3 r1c3 r4c3 r1c4 r4c4 r1c4 r4c4"
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


def test_variants_of_the_other_world_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--world", "tiles", "--variants", "text_all"])
    assert "'text_all' is unknown here; choose of direct, text, pause" in capsys.readouterr().err


def test_tables_of_the_comparison() -> None:
    def run(accuracy: float) -> dict:
        return {"accuracy": accuracy, "tokens": 6.0, "latents": 7.0, "cpu_s": 41.0}

    lines = table({"latents": {0: run(0.5), 2: run(0.75)}}).splitlines()
    assert lines[0] == "| variant | seed 0, % | seed 2, % | mean, % | steps | CPU s |"
    assert lines[2] == "| latents | 50.0 | 75.0 | 62.5 | 13 | 41 |"
    shares = np.array([[1.0, 0.5], [0.25, 0.0]])
    assert drift({2: shares}, ("white", "black")).splitlines()[2:] == [
        "| seed 2, white | 100 | 25 |",
        "| seed 2, black | 50 | 0 |",
    ]


@pytest.mark.parametrize("name", ["tiles", "balls"])
def test_states_are_drawn_as_in_the_clips(name: str) -> None:
    compared = SETTINGS[name]
    if name == "balls":
        clip = balls.draw_clip(0, "train", 0)
        row, frames = balls.manifest_row(clip, "train", 0), balls.render(clip)
    else:
        drawn = world.draw_clip(0, "train", 0)
        row = world.manifest_row(drawn, "train", 0)
        frames = world.render(drawn.board, drawn.path)
    places = compared.places(row)
    assert places.shape == (8, len(compared.balls))
    assert (compared.draw(row, places) == frames).all()


def test_questions_and_answers_are_true() -> None:
    tokenizer = make_tokenizer(balls.BALLS)
    latent = tokenizer(" next", add_special_tokens=False)["input_ids"][0]  # stands for a latent
    words = Words.of(tokenizer, latent, balls.BALLS)
    clips = [balls.draw_clip(0, "rl", index) for index in range(4)]
    known = {
        "boards": torch.tensor(np.stack([clip.board for clip in clips])).flatten(1),
        "cells": torch.tensor(np.stack([clip.cells for clip in clips])),
    }
    generator = torch.Generator().manual_seed(0)
    questions = balls.ask(known, words, Perception(reads=2, tiles=3), generator)
    names = texts.cells()

    for index, clip in enumerate(clips):
        said = str(tokenizer.decode(questions.ids[index])).split()
        places = [[names[cell] for cell in state] for state in clip.cells]
        assert said[:5] == ["where", "white", places[1][0], "black", places[1][1]]
        for tile in range(3):
            task, cell, colour = said[5 + 3 * tile : 8 + 3 * tile]
            assert task == "tile"
            assert texts.COLOURS[clip.board.flat[names.index(cell)]] == colour
        reads = questions.states[index].tolist()
        assert reads[0::2] == reads[1::2]  # once a ball
        expected = []
        for state in reads[::2]:
            for task, place in (("read", places[state]), ("next", places[state + 1])):
                for ball, name in enumerate(balls.NAMES):
                    expected += [task, name, "next", place[ball]]
        assert said[14:] == expected
    assert questions.tasks == (
        *("where",) * 2,
        *("tile",) * 3,
        *(("read",) * 2 + ("next",) * 2) * 2,
    )
