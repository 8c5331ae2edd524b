"""Tasks: what differs between training for classification, detection and segmentation."""
