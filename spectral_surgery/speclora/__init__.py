"""SpecLoRA (arXiv 2505.23099) as a PEFT tuner: LoRA plus learnable scales on k rows of the frozen weight.

Importing this package makes PEFT know the type ``SPECLORA``. Without it PEFT refuses such an adapter, which is wanted:
saved as plain LoRA it would load without its scales and without a word.
"""

from peft.utils import register_peft_method

from spectral_surgery.speclora.config import SpecLoraConfig
from spectral_surgery.speclora.export import as_lora, save_as_lora
from spectral_surgery.speclora.layer import Scale, SpecLoraLayer
from spectral_surgery.speclora.model import SpecLoraModel, parameter_groups
from spectral_surgery.speclora.operating import SpecMeasurement, edit_speclora, lora_part, measure_speclora

__all__ = [
    "Scale",
    "SpecLoraConfig",
    "SpecLoraLayer",
    "SpecLoraModel",
    "SpecMeasurement",
    "as_lora",
    "edit_speclora",
    "lora_part",
    "measure_speclora",
    "parameter_groups",
    "save_as_lora",
]

register_peft_method(name="speclora", config_cls=SpecLoraConfig, model_cls=SpecLoraModel, prefix="lora_")
