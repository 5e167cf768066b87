"""Long generation: a model continues long prompts under several strategies, and full attention judges what it wrote."""
