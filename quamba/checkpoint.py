def attach(model, quantization): model.quantization=quantization
def load(d): raise NotImplementedError
