"""Groups become rows of tokens: prompts are encoded, images opened or read from the feature cache, texts packed after them as a forest."""
