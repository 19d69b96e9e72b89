"""From raw text to token shards: corpora, filters, de-duplication, decontamination, mixtures."""
