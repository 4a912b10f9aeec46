"""Registers of the 82599 that only the model needs, reset values, and the addresses kept from the 82598."""

from ..core.registers import Mode, bit, bits, reg, table
from ..drivers.ixgbe import regs as ixgbe
from ..drivers.ixgbe.regs import counter

RX_QUEUES = TX_QUEUES = 128
STATISTICS_QUEUES = 16

# Interrupt causes and masks, 8.2.3.5: what is set here and cleared there
EICS = reg(0x00808, mode=Mode.WO, at="8.2.3.5")
EIMS = reg(0x00880, at="8.2.3.5")
EICS_EX = reg(0x00A90, mode=Mode.WO, count=2, at="8.2.3.5")
EIMS_EX = reg(0x00AA0, count=2, at="8.2.3.5")
EIMC_EX = reg(0x00AB0, mode=Mode.WO, count=2, at="8.2.3.5")

# Semaphores between drivers and firmware, 8.2.3.4
SWSM = reg(0x10140, mode=Mode.RS, at="8.2.3.4", SMBI=bit(0), SWESMBI=bit(1))

# Receive
MCSTCTRL = reg(0x05090, at="8.2.3.7", MO=bits(1, 0), MFE=bit(2))
SECRXCTRL = reg(0x08D00, at="8.2.3.12", RX_DIS=bit(1))
SECRXSTAT = reg(0x08D04, mode=Mode.RO, at="8.2.3.12", RDY=bit(0), OFF_DIS=bit(1))
SECTXSTAT = reg(0x08804, mode=Mode.RO, at="8.2.3.12", RDY=bit(0), OFF_DIS=bit(1))

# The upper 64 receive queues, the upper 64 transmit queues
RX_UPPER, TX_UPPER = 0x0D000, 0x07000

# Statistics: which of 16 counter sets a queue counts in, then the counters
RQSMR = reg(0x02300, count=32, at="8.2.3.23")
TQSM = reg(0x08600, count=32, at="8.2.3.23")
PRC = counter(0x0405C, count=6)  # frames of 64, 65-127, 128-255, 256-511, 512-1023, 1024-max bytes
GPRC = counter(0x04074)
GORCL = counter(0x04088)
GORCH = counter(0x0408C)
TORL = counter(0x040C0)
TORH = counter(0x040C4)
TPR = counter(0x040D0)
TPT = counter(0x040D4)
PTC = counter(0x040D8, count=6)
MPTC = counter(0x040F0)
BPTC = counter(0x040F4)
QPTC = counter(0x06030, stride=0x40, count=16)
QBTC_L = counter(0x08700, stride=8, count=16)
QBTC_H = counter(0x08704, stride=8, count=16)

TABLE = table(globals())
ALL = {**ixgbe.TABLE, **TABLE}

# The 82598's places of registers that moved: (first, end, native first, stride of the native ones)
ALIASES = (
    (0x02100, 0x02140, 0x01014, 0x40),  # SRRCTL[0..15]
    (0x02200, 0x02240, 0x0100C, 0x40),  # DCA_RXCTRL[0..15]
    (0x05400, 0x05480, 0x0A200, 4),  # RAL and RAH [0..15]
    (0x05480, 0x054C0, 0x0EA00, 4),  # PSRTYPE[0..15]
    (0x05818, 0x0581C, 0x0EC80, 4),  # MRQC
    (0x05C00, 0x05C80, 0x0EB00, 4),  # RETA
    (0x05C80, 0x05CA8, 0x0EB80, 4),  # RSSRK
)
NATIVE = {alias: native + (alias - first) // 4 * stride
          for first, end, native, stride in ALIASES for alias in range(first, end, 4)}

RESET = {
    ixgbe.EEC: ixgbe.EEC.PRESENT | ixgbe.EEC.AUTO_RD,
    ixgbe.HLREG0: ixgbe.HLREG0.TXCRCEN | ixgbe.HLREG0.RXCRCSTRP | ixgbe.HLREG0.TXPADEN,
    ixgbe.MAXFRS: ixgbe.MAXFRS.MFS.of(1518),
    ixgbe.AUTOC: ixgbe.AUTOC.LMS.of(3),  # 10 Gbit/s serial
    ixgbe.LINKS: ixgbe.LINKS.UP | ixgbe.LINKS.SPEED.of(3),
    ixgbe.RDRXCTL: ixgbe.RDRXCTL.DMAIDONE,
    ixgbe.SRRCTL: ixgbe.SRRCTL.BSIZEPACKET.of(2),
    ixgbe.RXPBSIZE[0]: ixgbe.RXPBSIZE.SIZE.of(512),
    ixgbe.TXPBSIZE[0]: ixgbe.TXPBSIZE.SIZE.of(160),
    SECRXSTAT: SECRXSTAT.RDY | SECRXSTAT.OFF_DIS,
    SECTXSTAT: SECTXSTAT.RDY | SECTXSTAT.OFF_DIS,
}
