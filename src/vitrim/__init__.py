"""vitrim takes a trained Vision Transformer and gives back a smaller, really faster, dense one."""
