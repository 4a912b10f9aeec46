"""Registers of the 82599 that only the model needs, reset values, and the addresses kept from the 82598."""

from ..core.registers import Mode, bit, bits, reg, table
from ..drivers.ixgbe import regs as ixgbe
from ..drivers.ixgbe.regs import counter

RX_QUEUES = TX_QUEUES = 128
STATISTICS_QUEUES = 16

# Interrupts, 8.2.3.5: causes that software sets, masks of the first vectors and of other causes
EICS = reg(0x00808, at="8.2.3.5")
EIMS = reg(0x00880, at="8.2.3.5")
EIAM = reg(0x00890, at="8.2.3.5")
IVAR_MISC = reg(0x00A00, at="8.2.3.5", OTHER=bits(13, 8), OTHER_VALID=bit(15))
EICS_EX = reg(0x00A90, mode=Mode.WO, count=2, at="8.2.3.5")

# Pins, I2C and MDIO: 8.2.3.1 and 8.2.3.22
ESDP = reg(0x00020, at="8.2.3.1", SDP2=bit(2))
I2CCTL = reg(0x00028, at="8.2.3.1", CLK_IN=bit(0), CLK_OUT=bit(1), DATA_IN=bit(2), DATA_OUT=bit(3))
MSCA = reg(0x0425C, at="8.2.3.22", ADDRESS=bits(15, 0), DEVICE=bits(20, 16), PORT=bits(25, 21), OP=bits(27, 26),
           COMMAND=bit(30))
MSRWD = reg(0x04260, at="8.2.3.22", WRITE=bits(15, 0), READ=bits(31, 16))
ANLP1 = reg(0x042B0, mode=Mode.RO, at="8.2.3.22", STATE=bits(19, 16))

# EEPROM size, semaphores between drivers and firmware: 8.2.3.2 and 8.2.3.4
EEC_SIZE = bits(14, 11)  # of EEC: log2 of the EEPROM's 16-bit words, less 6
SWSM = reg(0x10140, mode=Mode.RS, at="8.2.3.4", SMBI=bit(0), SWESMBI=bit(1))
FWSM = reg(0x10148, mode=Mode.RO, at="8.2.3.4", VALID=bit(15))
SW_FW_SYNC = reg(0x10160, at="8.2.3.4", SOFTWARE=bits(4, 0), FIRMWARE=bits(9, 5))

# Receive
RXCSUM = reg(0x05000, at="8.2.3.7", IPPCSE=bit(12), PCSD=bit(13))
VLNCTRL = reg(0x05088, at="8.2.3.7", VET=bits(15, 0), CFI=bit(28), CFIEN=bit(29), VFE=bit(30))
MCSTCTRL = reg(0x05090, at="8.2.3.7", MO=bits(1, 0), MFE=bit(2))
VFTA = reg(0x0A000, count=128, at="8.2.3.7")
PSRTYPE = reg(0x0EA00, count=64, at="8.2.3.7")
SECRXCTRL = reg(0x08D00, at="8.2.3.12", RX_DIS=bit(1))
SECRXSTAT = reg(0x08D04, mode=Mode.RO, at="8.2.3.12", RDY=bit(0), OFF_DIS=bit(1))
SECTXSTAT = reg(0x08804, mode=Mode.RO, at="8.2.3.12", RDY=bit(0), OFF_DIS=bit(1))

# Transmit: the EtherType of inserted VLAN tags (a field of DMATXCTL), what segmentation does with TCP's flags
DMATXCTL_VT = bits(31, 16)
DTXTCPFLGL = reg(0x04A88, at="8.2.3.9", FIRST=bits(11, 0), MIDDLE=bits(27, 16))
DTXTCPFLGH = reg(0x04A8C, at="8.2.3.9", LAST=bits(11, 0))

# Flow director, 8.2.3.17
# DEVIATION(sim-absent): filters are taken and steer nothing; what else is absent has no registers here at all.
FDIRCTRL = reg(0x0EE00, at="8.2.3.17", PBALLOC=bits(1, 0), INIT_DONE=bit(3))
FDIRCMD = reg(0x0EE2C, at="8.2.3.17", CMD=bits(1, 0))

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
XEC = counter(0x04120)  # received with a wrong IPv4, TCP, UDP or SCTP checksum
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
    ixgbe.EEC: ixgbe.EEC.PRESENT | ixgbe.EEC.AUTO_RD | EEC_SIZE.of(8),
    ixgbe.HLREG0: ixgbe.HLREG0.TXCRCEN | ixgbe.HLREG0.RXCRCSTRP | ixgbe.HLREG0.TXPADEN,
    ixgbe.MAXFRS: ixgbe.MAXFRS.MFS.of(1518),
    ixgbe.AUTOC: ixgbe.AUTOC.LMS.of(3),  # 10 Gbit/s serial
    ixgbe.RDRXCTL: ixgbe.RDRXCTL.DMAIDONE,
    ixgbe.SRRCTL: ixgbe.SRRCTL.BSIZEPACKET.of(2),
    ixgbe.RXPBSIZE[0]: ixgbe.RXPBSIZE.SIZE.of(512),
    ixgbe.TXPBSIZE[0]: ixgbe.TXPBSIZE.SIZE.of(160),
    ixgbe.DMATXCTL: DMATXCTL_VT.of(0x8100),
    DTXTCPFLGL: DTXTCPFLGL.FIRST.of(0xFF6) | DTXTCPFLGL.MIDDLE.of(0xF76),
    DTXTCPFLGH: DTXTCPFLGH.LAST.of(0xF7F),
    VLNCTRL: VLNCTRL.VET.of(0x8100),
    ANLP1: ANLP1.STATE.of(15),
    FWSM: FWSM.VALID,
    I2CCTL: I2CCTL.CLK_IN | I2CCTL.CLK_OUT | I2CCTL.DATA_IN | I2CCTL.DATA_OUT,
    SECRXSTAT: SECRXSTAT.RDY | SECRXSTAT.OFF_DIS,
    SECTXSTAT: SECTXSTAT.RDY | SECTXSTAT.OFF_DIS,
}
