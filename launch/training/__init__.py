"""The pretraining loop over megatron.core behind launch/pretrain.py."""
