"""Feature bits and configuration of a virtio network device (virtio 1.1: sections 5.1.3, 5.1.4 and 6)."""

MTU, MAC, MRG_RXBUF, STATUS, MQ = 1 << 3, 1 << 5, 1 << 15, 1 << 16, 1 << 22
CTRL_VQ, CTRL_RX, CTRL_MAC_ADDR = 1 << 17, 1 << 18, 1 << 23
NOTIFY_ON_EMPTY, ANY_LAYOUT = 1 << 24, 1 << 27  # of devices before version 1
EVENT_IDX, VERSION_1, ACCESS_PLATFORM = 1 << 29, 1 << 32, 1 << 33

# The configuration, 5.1.4: byte offsets.
CONFIG_MAC, CONFIG_STATUS, CONFIG_MAX_PAIRS = 0, 6, 8
LINK_UP = 1  # in STATUS

TRANSITIONAL = 0x1000  # the PCI device id of a network device that may be a legacy one

# The status of a device, 2.1.
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64

# On PCI, capabilities by their cfg_type, 4.1.4. Registers are (offset, width in bytes).
COMMON, NOTIFY, DEVICE = 1, 2, 4
CAPABILITIES = {"common configuration": COMMON, "notifications": NOTIFY, "device configuration": DEVICE}

# Common configuration, 4.1.4.3.
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = (0, 4), (4, 4), (8, 4), (12, 4)
DEVICE_STATUS, CONFIG_GENERATION = (20, 1), (21, 1)
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR = (22, 2), (24, 2), (26, 2)
QUEUE_ENABLE, QUEUE_NOTIFY_OFF = (28, 2), (30, 2)
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = (32, 8), (40, 8), (48, 8)
COMMON_SIZE = 56

# Legacy devices, 4.1.4.8: BAR 0.
LEGACY_DEVICE_FEATURES, LEGACY_DRIVER_FEATURES, LEGACY_QUEUE_PAGE = (0, 4), (4, 4), (8, 4)
LEGACY_QUEUE_SIZE, LEGACY_QUEUE_SELECT, LEGACY_STATUS = (12, 2), (14, 2), (18, 1)
LEGACY_QUEUE_NOTIFY = 16  # 2 bytes
LEGACY_SIZE = 20  # without the registers of vectors, 4 bytes, which are there while MSI-X is on
LEGACY_QUEUE_VECTOR = (22, 2)

NO_VECTOR = 0xFFFF  # 4.1.5.1.2: how a device says that it cannot use one
