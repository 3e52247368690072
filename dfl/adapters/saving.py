"""One model of a run as a folder that stock PEFT loads."""

import copy
from pathlib import Path

from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from dfl.adapters.attach import Adapted, Rows, bind
from dfl.adapters.peft_layers import ADAPTER, Saved


def save_adapter(folder: Path, adapted: Adapted, rows: Rows, base_name: str) -> None:
    """One model (rows of one) as a folder that `PeftModel.from_pretrained(base, folder)` loads.

    The adapter has the rank that its values fill; a residual beside the factors becomes part of it, as further rank, so
    that stock PEFT computes what was evaluated.
    """
    folder.mkdir(parents=True)
    bind(adapted, rows.x[0])
    tensors = get_peft_model_state_dict(adapted.model, adapter_name=ADAPTER, save_embedding_layers=False)
    config = copy.copy(adapted.model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base_name, True
    tensors = adapted.kind.layers.save(_model(adapted, rows), tensors, config)
    # clones: a view must not carry the rows beside it
    save_file({name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()},
              str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _model(adapted: Adapted, rows: Rows) -> Saved:
    scale = 1.0 if rows.scale is None else rows.scale[0]
    if rows.residual is None:
        return Saved([adapted.lora], [rows.x], adapted.ranks.reference, scale)
    return Saved([adapted.lora, adapted.residual], [rows.x, rows.residual], adapted.ranks.reference, scale)
