"""Private training of convex problems with bounded gradients."""
