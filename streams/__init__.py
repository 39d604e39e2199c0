"""The live application: Kafka, Faust and RocksDB. Imports `models`."""
