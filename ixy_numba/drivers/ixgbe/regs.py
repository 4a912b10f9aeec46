"""The registers of the 82599 family that the driver uses, by their names and sections in the datasheet (331520)."""

from ...core.registers import Mode, bit, bits, reg, table

BAR_SIZE = 0x20000
QUEUES = 64  # of each direction; the 82599 has 128, the upper half of the receive queues lies elsewhere
RX_QUEUE, TX_QUEUE, QUEUE_STRIDE = 0x01000, 0x06000, 0x40  # the blocks of registers that belong to one queue


def per_queue(offset, at, **more):
    return reg(offset, stride=QUEUE_STRIDE, count=QUEUES, at=at, **more)


# General
CTRL = reg(0x00000, at="8.2.3.1.1", MASTER_DISABLE=bit(2), LRST=bit(3), RST=bit(26))
STATUS = reg(0x00008, mode=Mode.RO, at="8.2.3.1.2", LAN_ID=bits(3, 2), LINK_UP=bit(7), MASTER_ENABLED=bit(19))
CTRL_EXT = reg(0x00018, at="8.2.3.1.3", NS_DIS=bit(16), DRV_LOAD=bit(28))
EEC = reg(0x10010, at="8.2.3.2.1", PRESENT=bit(8), AUTO_RD=bit(9))
EERD = reg(0x10014, at="8.2.3.2.2", START=bit(0), DONE=bit(1), ADDR=bits(15, 2), DATA=bits(31, 16))

# Interrupts
EICR = reg(0x00800, at="8.2.3.5.1", mode=Mode.RC)
EIMC = reg(0x00888, at="8.2.3.5.4", mode=Mode.WO)
EIAC = reg(0x00810, at="8.2.3.5.5")
EIMS_EX = reg(0x00AA0, count=2, at="8.2.3.5.8")  # vectors 0 to 31, 32 to 63
EIMC_EX = reg(0x00AB0, mode=Mode.WO, count=2, at="8.2.3.5.9")
EIAM_EX = reg(0x00AD0, count=2, at="8.2.3.5")
EITR = reg(0x00820, count=24, at="8.2.3.5.12", INTERVAL=bits(11, 3), CNT_WDIS=bit(31))
EITR_UPPER = reg(0x12300, count=105, at="8.2.3.5.12")  # from vector 24 on
IVAR = reg(0x00900, count=64, at="8.2.3.5.16")
GPIE = reg(0x00898, at="8.2.3.5.18", MULTIPLE_MSIX=bit(4), OCD=bit(5), EIAME=bit(30), PBA_SUPPORT=bit(31))

# Receive: filters
FCTRL = reg(0x05080, at="8.2.3.7.1", SBP=bit(1), MPE=bit(8), UPE=bit(9), BAM=bit(10))
MTA = reg(0x05200, count=128, at="8.2.3.7.7")
RAL = reg(0x0A200, stride=8, count=128, at="8.2.3.7.8")
RAH = reg(0x0A204, stride=8, count=128, at="8.2.3.7.9", ADDR=bits(15, 0), AV=bit(31))
MRQC = reg(0x0EC80, at="8.2.3.7.12", MODE=bits(3, 0), TCP_IPV4=bit(16), IPV4=bit(17), IPV6=bit(20), TCP_IPV6=bit(21),
           UDP_IPV4=bit(22), UDP_IPV6=bit(23))
RETA = reg(0x0EB00, count=32, at="8.2.3.7.13")
RSSRK = reg(0x0EB80, count=10, at="8.2.3.7.14")

# Receive: queues
RDBAL = per_queue(0x01000, "8.2.3.8.1")
RDBAH = per_queue(0x01004, "8.2.3.8.2")
RDLEN = per_queue(0x01008, "8.2.3.8.3")
RDH = per_queue(0x01010, "8.2.3.8.4")
SRRCTL = per_queue(0x01014, "8.2.3.8.7", BSIZEPACKET=bits(4, 0), DESCTYPE=bits(27, 25), DROP_EN=bit(28))
RDT = per_queue(0x01018, "8.2.3.8.5")
RXDCTL = per_queue(0x01028, "8.2.3.8.6", ENABLE=bit(25), VME=bit(30))
DCA_RXCTRL = per_queue(0x0100C, "8.2.3.11.1")
RDRXCTL = reg(0x02F00, at="8.2.3.8.8", CRCSTRIP=bit(1), DMAIDONE=bit(3), RSCFRSTSIZE=bits(21, 17), RSCACKC=bit(25),
              FCOE_WRFIX=bit(26))
RXCTRL = reg(0x03000, at="8.2.3.8.10", RXEN=bit(0))
RXPBSIZE = reg(0x03C00, count=8, at="8.2.3.8.9", SIZE=bits(19, 10))

# Transmit
DTXMXSZRQ = reg(0x08100, at="8.2.3.9.1", MAX_BYTES_NUM_REQ=bits(11, 0))
DMATXCTL = reg(0x04A80, at="8.2.3.9.2", TE=bit(0))
TDBAL = per_queue(0x06000, "8.2.3.9.5")
TDBAH = per_queue(0x06004, "8.2.3.9.6")
TDLEN = per_queue(0x06008, "8.2.3.9.7")
TDH = per_queue(0x06010, "8.2.3.9.8")
TDT = per_queue(0x06018, "8.2.3.9.9")
TXDCTL = per_queue(0x06028, "8.2.3.9.10", PTHRESH=bits(6, 0), HTHRESH=bits(14, 8), WTHRESH=bits(22, 16), ENABLE=bit(25))
TDWBAL = per_queue(0x06038, "8.2.3.9.11", HEAD_WB_EN=bit(0))
TDWBAH = per_queue(0x0603C, "8.2.3.9.12")
DCA_TXCTRL = per_queue(0x0600C, "8.2.3.11.2", DESC_WB_RO=bit(11))
TXPBSIZE = reg(0x0CC00, count=8, at="8.2.3.9.13", SIZE=bits(19, 10))
TXPBTHRESH = reg(0x04950, count=8, at="8.2.3.9.16")
RTTDCS = reg(0x04900, at="8.2.3.10.2", ARBDIS=bit(6))

# MAC and link
HLREG0 = reg(0x04240, at="8.2.3.22.8", TXCRCEN=bit(0), RXCRCSTRP=bit(1), JUMBOEN=bit(2), TXPADEN=bit(10), LPBK=bit(15))
MAXFRS = reg(0x04268, at="8.2.3.22.13", MFS=bits(31, 16))
AUTOC = reg(0x042A0, at="8.2.3.22.19", LMS=bits(15, 13), RESTART_AN=bit(12), PMA_PMD_10G=bits(8, 7))
LINKS = reg(0x042A4, mode=Mode.RO, at="8.2.3.22.20", SPEED=bits(29, 28), UP=bit(30))

# Statistics. All clear on read, 8.2.3.23 (except where the mode says otherwise); bytes count the CRC.
STATISTICS = "8.2.3.23"


def counter(offset, **more):
    return reg(offset, mode=Mode.RC, at=STATISTICS, **more)


CRCERRS = counter(0x04000)
ILLERRC = counter(0x04004)
ERRBC = counter(0x04008)
RLEC = counter(0x04040)
RUC = counter(0x040A4)
RFC = counter(0x040A8)
ROC = counter(0x040AC)
RJC = counter(0x040B0)
MPC = counter(0x03FA0, count=8)
QPRC = counter(0x01030, stride=0x40, count=16)  # per queue: what got there; bytes without the stripped CRC
QBRC_L = counter(0x01034, stride=0x40, count=16)
QBRC_H = counter(0x01038, stride=0x40, count=16)
QPRDC = counter(0x01430, stride=0x40, count=16)
BPRC = counter(0x04078)
MPRC = counter(0x0407C)
GPTC = counter(0x04080)
GOTCL = counter(0x04090)
GOTCH = counter(0x04094)

TABLE = table(globals())
