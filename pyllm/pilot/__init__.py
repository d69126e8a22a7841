"""A trial of adaptive attention on somebody's own documents, and its report."""
