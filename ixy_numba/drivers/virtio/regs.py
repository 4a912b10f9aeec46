"""Feature bits and configuration of a virtio network device (virtio 1.1: sections 5.1.3, 5.1.4 and 6)."""

MTU, MAC, MRG_RXBUF, STATUS, MQ = 1 << 3, 1 << 5, 1 << 15, 1 << 16, 1 << 22
NOTIFY_ON_EMPTY, ANY_LAYOUT = 1 << 24, 1 << 27  # of devices before version 1
EVENT_IDX, VERSION_1 = 1 << 29, 1 << 32

# The configuration, 5.1.4: byte offsets.
CONFIG_MAC, CONFIG_STATUS = 0, 6
LINK_UP = 1  # in STATUS
