"""What the library is compared with; used by benchmarks and comparisons only, and imported lazily."""
