"""Memory Mosaics as models of transformers: importing this registers them with AutoConfig and AutoModelForCausalLM."""

from thresher.models.mosaic.configuration import MemoryMosaicConfig
from thresher.models.mosaic.modeling import MemoryMosaicForCausalLM, MemoryMosaicModel, MosaicCache, decay_groups

__all__ = ["MemoryMosaicConfig", "MemoryMosaicForCausalLM", "MemoryMosaicModel", "MosaicCache", "decay_groups"]
