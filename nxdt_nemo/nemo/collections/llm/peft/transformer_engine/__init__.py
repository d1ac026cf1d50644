"""`transformer_engine` as nemo.collections.llm.peft.lora sees it: a name to compare layers with, which none is.

Room nemo/. A view for that module (patches/views.toml): it asks each layer whether it is TransformerEngine's, with no
case for none. Proof: tests/nemo/test_nemo2.py.
"""

from nxdt_nemo.nemo.collections.llm.peft.transformer_engine import pytorch

__all__ = ["pytorch"]
