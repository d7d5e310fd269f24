"""Networks: classifiers by name, the multi-header student on any of them, generators, and the fusion of heads."""
