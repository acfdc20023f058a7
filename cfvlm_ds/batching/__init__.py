"""Groups to rows of tokens: prompts encoded, images opened or taken from the feature cache, texts packed after them as a forest."""
