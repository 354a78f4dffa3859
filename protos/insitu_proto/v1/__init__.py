"""The contract between insitu's programs: generated from the .proto files beside it."""
