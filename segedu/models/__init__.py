"""One paper, one file. Images (N, 3, H, W) in [0, 1] in, class scores (N, K, H, W) out."""
