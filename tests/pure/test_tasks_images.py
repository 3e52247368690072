"""Images beside their file, with a model and a processor that need no torchvision."""

import numpy as np
import pytest
import tiny_models
import torch

from dfl.config import DataConfig, ModelConfig
from dfl.tasks import images, load

PIL = pytest.importorskip("PIL.Image")


@pytest.fixture
def pictures(tmp_path):
    """Sixteen pictures, dark and light, in a folder beside pictures.csv; modes and formats differ."""
    (tmp_path / "png").mkdir()
    rng, lines = np.random.default_rng(0), ["image,label"]
    for i in range(16):
        pixels = rng.integers(0, 100, size=(20, 24, 3), dtype=np.uint8) + np.uint8(120 * (i % 2))
        picture = PIL.fromarray(pixels).convert(["RGB", "L", "RGBA", "P"][i % 4])
        picture.save(tmp_path / "png" / f"{i}.png")
        lines.append(f"png/{i}.png,{['dark', 'light'][i % 2]}")
    (tmp_path / "pictures.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def bundle(folder, **fields):
    model = ModelConfig(name=str(tiny_models.save(folder / "vit", "vit")), task="image_classification", **fields)
    return load(model, DataConfig(source="file", train=str(folder / "pictures.csv"), valid_fraction=0.25), seed=0)


def test_images_become_batches_and_losses(pictures):
    loaded = bundle(pictures, layers=2)
    assert loaded.head_modules == ("classifier",) and loaded.facts["label_names"] == ["dark", "light"]
    assert (len(loaded.train), len(loaded.valid)) == (12, 4)
    assert loaded.facts["num_parameters"] < bundle(pictures).facts["num_parameters"]
    batch = loaded.task.collate([loaded.train.features[i] for i in np.arange(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    with torch.no_grad():
        output = loaded.model(**loaded.task.inputs(batch))
    assert loaded.task.losses(output, batch, 2).shape == (2,)
    names = loaded.train.columns["image"]
    for i, feature in enumerate(loaded.train.features):  # pixels and labels belong together
        assert feature["labels"] == loaded.train.labels[i] == int(names[i][4:-4]) % 2
        assert (feature["pixel_values"].mean() > 0) == bool(feature["labels"])


def test_few_images_are_kept_and_all_are_prepared_alike(pictures, monkeypatch):
    loaded = bundle(pictures)
    first = [feature["pixel_values"] for feature in loaded.train.features]
    assert len(loaded.train.features.kept) == 12
    monkeypatch.setattr(images, "KEPT_BYTES", 3 * first[0].nbytes)
    loaded.train.features.kept.clear()
    again = [feature["pixel_values"] for feature in loaded.train.features]
    assert len(loaded.train.features.kept) == 3
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(loaded.train.features[-1]["pixel_values"], first[-1])
    assert [f["labels"] for f in loaded.train.features[2:5]] == loaded.train.labels[2:5].tolist()
    with pytest.raises(IndexError):
        loaded.train.features[12]


@pytest.mark.parametrize("line, message", [
    ("png/none.png,dark", "data.image = 'image': line 18 of .*pictures.csv names 'png/none.png', which is not a file in"),
    ("png/cut.png,dark", "line 18 of .*pictures.csv: the image cannot be read: "),
    ("pictures.csv,dark", "line 18 of .*pictures.csv: the image cannot be read: cannot identify")])
def test_what_is_no_image(pictures, line, message):
    (pictures / "png" / "cut.png").write_bytes((pictures / "png" / "0.png").read_bytes()[:200])
    with open(pictures / "pictures.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        loaded = bundle(pictures)
        for split in (loaded.train, loaded.valid):
            list(split.features)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_processor_and_a_model_of_texts(pictures):
    path = tiny_models.save(pictures / "bare", "vit")
    for file in path.glob("*processor*"):
        file.unlink()
    data = DataConfig(source="file", train=str(pictures / "pictures.csv"))
    with pytest.raises(ValueError, match="bare' cannot be loaded"):
        load(ModelConfig(name=str(path), task="image_classification"), data, seed=0)
    with pytest.raises(ValueError, match="bert' cannot be loaded"):
        load(ModelConfig(name=str(tiny_models.save(pictures / "bert", "bert")), task="image_classification"), data, seed=0)


def test_encoded_and_decoded_images_are_the_same(pictures):
    path = pictures / "png" / "0.png"
    opened = PIL.open(path)
    forms = ["png/0.png", path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)},
             opened]
    pixels = [np.asarray(images.open_image(form, pictures)) for form in forms]
    assert all(np.array_equal(pixels[0], other) for other in pixels)
