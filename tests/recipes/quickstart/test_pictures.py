"""The quickstart's pictures: files of the right kind whatever the history holds."""

import numpy as np
from PIL import Image

from recipes.quickstart import pictures, world


def test_learning_curves_draws_full_sparse_and_empty_histories(tmp_path):
    rows = [
        {"stage": "sft", "step": step, "loss_text": 1 / (step + 1), "loss_latent": 0.5}
        for step in range(40)
    ]
    rows += [{"stage": "sft", "step": 39, "validation_accuracy": 0.6}]
    rows += [
        {"stage": "rl", "step": step, "outcome": 0.5, "imagined": 0.4, "entropy": None}
        for step in range(3)
    ]
    for name, history in (
        ("full", rows),
        ("one", [{"stage": "rl", "step": 0, "reward": 1.0}]),
        ("none", []),
    ):
        path = tmp_path / f"{name}.png"
        pictures.learning_curves(history, path)
        assert Image.open(path).size == (1440, 768)


def test_imagination_marks_latents_that_agree_with_the_truth(tmp_path):
    clip = world.draw_clip(0, "train", 3)
    frames = world.render(clip.board, clip.path)
    right, wrong = list(frames[1:]), [frames[0]] * 7
    greens = []
    for name, nearest in (("right", right), ("wrong", wrong)):
        pictures.imagination(tmp_path / f"{name}.png", frames[:2], frames[2:], nearest, "a clip")
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        greens.append((pixels == [0, 158, 115]).all(-1).sum())  # `pictures.GREEN`
    # This clip's ball is never back at its first place, so no latent agrees in the second picture.
    assert clip.path[0].tolist() not in clip.path[1:].tolist()
    assert greens[0] > 1000 and greens[1] == 0


def test_imagination_takes_any_number_of_latents(tmp_path):
    frames = world.render(*(lambda clip: (clip.board, clip.path))(world.draw_clip(0, "train", 0)))
    for count in (0, 3, 9):
        nearest = [frames[0]] * count
        pictures.imagination(
            tmp_path / "x.png", frames[:2], frames[2:], nearest, f"{count} latents"
        )
        assert Image.open(tmp_path / "x.png").size[0] > 1000
