"""The numpy reference: the readable specification of everything the native library computes."""
