"""The paper's tables and figures, made again and set beside the published numbers."""
