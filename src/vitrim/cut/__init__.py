"""All that makes a model smaller, whatever the method."""
