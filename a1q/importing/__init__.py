"""Checkpoints and caches of ANEMLL-QUANT-1 (the training programs in Anemll/qwen3_apple_style_2bit_qat_lora), read into
models, adapters and text of a1q. What the tensors of such a checkpoint mean is written down in `docs/importing.md`."""
