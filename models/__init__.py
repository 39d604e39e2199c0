"""What a prediction is made with. Knows no Kafka, no streams, no trainer."""
