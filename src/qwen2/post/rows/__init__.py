"""What is trained on: files of the field's tools read as records, records as ids with their mask, examples that share a row."""
