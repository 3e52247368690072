"""Upload of an exported folder to the Hugging Face hub; every failure is one line."""

from pathlib import Path


def check(name: str) -> None:
    """What can be known before anything is written: the name, and that there is a token. ValueError, OSError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name!r} is not a name on the hub: {error}") from None
    if "/" not in name:
        raise ValueError(f"--push {name!r} lacks its owner; allowed: OWNER/NAME")
    if get_token() is None:
        raise OSError(f"--push {name!r}: no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, private: bool) -> str:
    """The address of the upload. A repository that exists gets a new commit. OSError in one line for whatever fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by dfl")
        return f"{api.endpoint}/{name}"
    except Exception as error:  # the client raises its own errors, those of its HTTP library and ConnectionError
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"--push {name!r} failed: {said}; the export is in {str(folder)!r}") from error
