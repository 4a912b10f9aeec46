"""Bring an 82599 up, one function a step of the datasheet's section 4.6, and make it quiet again."""

import time

from ...core.errors import IxyError
from ...core.pool import BUFFER_SIZE
from . import regs as r

# The example key of datasheet section 7.1.2.8.1's hash: the verification suite of the Toeplitz hash uses it too.
RSS_KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
RSS_QUEUES = 16  # a redirection table entry has 4 bits
LEGACY, ADVANCED = 0, 1  # SRRCTL.DESCTYPE, 8.2.3.8.7
THROTTLE_US = 20  # between two interrupts of a queue
IVAR_VALID = 0x80  # in each of IVAR's four entries, 8.2.3.5.16


def disable_interrupts(regs):
    """4.6.3.1: mask all interrupts."""
    regs.write(r.EIMC, 0x7FFFFFFF)
    for register in r.EIMC_EX.each():
        regs.write(register, 0xFFFFFFFF)


def reset(regs):
    """4.6.3.2: global reset of MAC and link, then interrupts off again."""
    regs.set(r.CTRL, r.CTRL.RST | r.CTRL.LRST)
    time.sleep(0.01)
    regs.wait(r.CTRL, r.CTRL.RST, 0, hint="the device does not come out of reset")
    disable_interrupts(regs)


def wait_for_eeprom(regs):
    """4.6.3: the device has read its configuration from the EEPROM."""
    regs.wait(r.EEC, r.EEC.AUTO_RD, hint="is the EEPROM programmed?")


def wait_for_dma(regs):
    """4.6.3: the DMA engine has initialised."""
    regs.wait(r.RDRXCTL, r.RDRXCTL.DMAIDONE, hint="is bus mastering on?")


def init_link(regs):
    """4.6.4: restart auto-negotiation in the mode that the EEPROM chose."""
    # DEVIATION(link-once): no other mode is tried if the link stays down.
    regs.set(r.AUTOC, r.AUTOC.RESTART_AN)


def clear_counters(regs):
    """4.6.5: statistics clear on read."""
    for register in r.TABLE.values():
        if register.at == r.STATISTICS:
            for one in register.each():
                regs.read(one)


def init_receive(regs, queues, kind=ADVANCED):
    """4.6.7: filters, one packet buffer, CRC stripped, hash over the queues. `queues`: (iova, descriptors) each."""
    regs.clear(r.RXCTRL, r.RXCTRL.RXEN)  # as section 4.6.7 asks while it is set up
    for k in range(1, 8):
        regs.write(r.RXPBSIZE[k], 0)
    regs.write(r.RXPBSIZE[0], r.RXPBSIZE.SIZE.of(512))  # KiB
    for register in r.MTA.each():
        regs.write(register, 0)
    regs.set(r.HLREG0, r.HLREG0.RXCRCSTRP)
    regs.set(r.RDRXCTL, r.RDRXCTL.CRCSTRIP | r.RDRXCTL.RSCACKC | r.RDRXCTL.FCOE_WRFIX)  # the last two must be 1
    regs.clear(r.RDRXCTL, r.RDRXCTL.RSCFRSTSIZE)
    regs.set(r.FCTRL, r.FCTRL.BAM)
    init_rss(regs, len(queues))
    for k, (iova, descriptors) in enumerate(queues):
        srrctl = regs.read(r.SRRCTL[k]) & ~(r.SRRCTL.DESCTYPE | r.SRRCTL.BSIZEPACKET)
        regs.write(r.SRRCTL[k], srrctl | r.SRRCTL.DESCTYPE.of(kind) | r.SRRCTL.BSIZEPACKET.of(BUFFER_SIZE >> 10)
                   | (r.SRRCTL.DROP_EN if len(queues) > 1 else 0))  # one full queue must not hold up the others
        _ring(regs, k, iova, descriptors, r.RDBAL, r.RDBAH, r.RDLEN, r.RDH, r.RDT)
    regs.set(r.CTRL_EXT, r.CTRL_EXT.NS_DIS)  # 4.6.7: no snoop must be off
    for k in range(len(queues)):
        regs.clear(r.DCA_RXCTRL[k], 1 << 12)  # 8.2.3.11.1: bit 12 must be 0
    # DEVIATION(flow-control-off): 4.6.5's registers keep their reset values, pause frames are neither sent nor obeyed.
    regs.set(r.RXCTRL, r.RXCTRL.RXEN)


def init_rss(regs, queues):
    """7.1.2.8: spread flows over the first 16 queues by a hash of addresses and ports."""
    if queues == 1:
        regs.write(r.MRQC, 0)
        return
    for k in range(10):
        regs.write(r.RSSRK[k], int.from_bytes(RSS_KEY[4 * k : 4 * k + 4], "little"))
    spread = min(queues, RSS_QUEUES)
    for k in range(32):
        regs.write(r.RETA[k], sum((4 * k + j) % spread << 8 * j for j in range(4)))
    hashed = r.MRQC.IPV4 | r.MRQC.IPV6 | r.MRQC.TCP_IPV4 | r.MRQC.TCP_IPV6 | r.MRQC.UDP_IPV4 | r.MRQC.UDP_IPV6
    regs.write(r.MRQC, r.MRQC.MODE.of(1) | hashed)


def init_interrupts(regs, queues):
    """4.6.6: receive queue k raises vector k, once: its message clears the cause and masks the vector again."""
    regs.write(r.GPIE, r.GPIE.MULTIPLE_MSIX | r.GPIE.OCD | r.GPIE.EIAME | r.GPIE.PBA_SUPPORT)
    for pair in range((queues + 1) // 2):
        allocation = 0
        for k in range(2 * pair, min(2 * pair + 2, queues)):
            allocation |= (IVAR_VALID | k) << 16 * (k % 2)
        regs.write(r.IVAR[pair], allocation)
    regs.write(r.EIAC, 0xFFFF)  # of the first 16 vectors; the others have no cause bit to be cleared
    for k, register in enumerate(r.EIAM_EX.each()):
        regs.write(register, (1 << queues) - 1 >> 32 * k & 0xFFFFFFFF)
    for k in range(queues):
        register = r.EITR[k] if k < r.EITR.count else r.EITR_UPPER[k - r.EITR.count]
        regs.write(register, r.EITR.INTERVAL.of(THROTTLE_US // 2))  # of 2 us


def init_transmit(regs, queues):
    """4.6.8: CRC and padding by the device, one packet buffer, DMA on. `queues`: (iova, descriptors) each."""
    regs.set(r.HLREG0, r.HLREG0.TXCRCEN | r.HLREG0.TXPADEN)
    regs.set(r.RTTDCS, r.RTTDCS.ARBDIS)  # while DTXMXSZRQ and the packet buffers change
    for k in range(1, 8):
        regs.write(r.TXPBSIZE[k], 0)
        regs.write(r.TXPBTHRESH[k], 0)
    regs.write(r.TXPBSIZE[0], r.TXPBSIZE.SIZE.of(160))  # KiB
    regs.write(r.TXPBTHRESH[0], 160 - (BUFFER_SIZE >> 10))  # room for another packet of the largest size, in KiB
    regs.write(r.DTXMXSZRQ, 0xFFF)  # 8.2.3.9.1: no DCB
    regs.clear(r.RTTDCS, r.RTTDCS.ARBDIS)
    for k, (iova, descriptors) in enumerate(queues):
        _ring(regs, k, iova, descriptors, r.TDBAL, r.TDBAH, r.TDLEN, r.TDH, r.TDT)
        # Fetch early and in bursts. WTHRESH must be 0, since only every 32nd descriptor reports its status (7.2.3.5).
        regs.write(r.TXDCTL[k], r.TXDCTL.PTHRESH.of(36) | r.TXDCTL.HTHRESH.of(8))
    regs.set(r.DMATXCTL, r.DMATXCTL.TE)


def enable_head_write_back(regs, k, iova):
    """7.2.3.5.2: how far queue `k` has sent goes to memory, 4 bytes at `iova`, instead of DD into descriptors."""
    # The datasheet asks for dword or qword alignment; TinyNF found that hardware writes only to multiples of 16.
    if iova % 16:
        raise IxyError(f"head write-back to {iova:#x}: expected a multiple of 16")
    regs.clear(r.DCA_TXCTRL[k], r.DCA_TXCTRL.DESC_WB_RO)  # relaxed ordering could let the head go backwards
    regs.write(r.TDWBAH[k], iova >> 32)
    regs.write(r.TDWBAL[k], iova & 0xFFFFFFFF | r.TDWBAL.HEAD_WB_EN)


def _ring(regs, k, iova, descriptors, low, high, length, head, tail):
    regs.write(low[k], iova & 0xFFFFFFFF)
    regs.write(high[k], iova >> 32)
    regs.write(length[k], 16 * descriptors)
    regs.write(head[k], 0)
    regs.write(tail[k], 0)


def start_receive_queue(regs, k, descriptors):
    """4.6.7.1: enable, wait, then hand over all descriptors but one (tail == head would mean none)."""
    regs.set(r.RXDCTL[k], r.RXDCTL.ENABLE)
    regs.wait(r.RXDCTL[k], r.RXDCTL.ENABLE, hint="is bus mastering on?")
    regs.write(r.RDT[k], descriptors - 1)


def start_transmit_queue(regs, k):
    """4.6.8.1: enable and wait; the ring is empty."""
    regs.set(r.TXDCTL[k], r.TXDCTL.ENABLE)
    regs.wait(r.TXDCTL[k], r.TXDCTL.ENABLE, hint="is bus mastering on?")


def set_promiscuous(regs, on):
    """8.2.3.7.1: accept every unicast and multicast address."""
    (regs.set if on else regs.clear)(r.FCTRL, r.FCTRL.UPE | r.FCTRL.MPE)


def link_mbit(regs):
    """8.2.3.22.20: speed in Mbit/s, 0 when the link is down."""
    links = regs.read(r.LINKS)
    return {1: 100, 2: 1000, 3: 10000}.get(r.LINKS.SPEED.get(links), 0) if links & r.LINKS.UP else 0


def quiesce(regs, rx_queues, tx_queues):
    """4.6.7.1, 4.6.8.1, 5.2.5.3.2: queues off, then no more DMA. Tries every step and returns the errors met."""
    errors = []

    def attempt(step, *args, **more):
        try:
            step(*args, **more)
        except IxyError as error:
            errors.append(error)

    attempt(disable_interrupts, regs)
    attempt(regs.clear, r.RXCTRL, r.RXCTRL.RXEN)
    for count, control in ((rx_queues, r.RXDCTL), (tx_queues, r.TXDCTL)):
        for k in range(count):
            if not errors:
                attempt(regs.clear, control[k], control.ENABLE)
                attempt(regs.wait, control[k], control.ENABLE, 0, timeout_s=0.2)
    attempt(regs.clear, r.DMATXCTL, r.DMATXCTL.TE)
    attempt(regs.set, r.CTRL, r.CTRL.MASTER_DISABLE)
    attempt(regs.wait, r.STATUS, r.STATUS.MASTER_ENABLED, 0, timeout_s=0.2)
    return errors
