"""The benchmark suite: what is asked (cases), who answers (providers), how it is measured."""
