"""How conversations look to the families of models that are known; ``posttrain.chat`` chooses by the tokenizer."""
