"""Post-training INT8 quantization of selective state space models: Mamba, Falcon-Mamba, Jamba."""
