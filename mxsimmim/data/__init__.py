"""From files to batches: which sample, when, masked where; images as uint8 until they are on the device."""
