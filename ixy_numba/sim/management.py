"""What a driver of the simulated 82599 finds beside the data path: EEPROM, semaphores, the SFP+ module, MDIO."""

from ..drivers.ixgbe import regs as r
from . import regs as m
from .eeprom import Eeprom
from .sfp import SfpModule

ADDRESS, WRITE, READ_AND_STEP, READ = range(4)  # MSCA.OP
NO_PHY = 0xFFFF


class Management:
    """Handlers of these registers for `model`. `phy` is what MDIO reaches: {(port, device, register): 16 bits}."""

    def __init__(self, model, mac, module):
        self._model = model
        self.eeprom, self.module, self.phy = Eeprom(mac), SfpModule() if module else None, {}
        self._phy_address = {}
        model.on_write(r.EEC, self._write_eec)
        model.on_write(r.EERD, self._write_eerd)
        model.on_read(m.SWSM, self._read_swsm)
        model.on_write(m.SWSM, lambda value: model.set(m.SWSM, value))
        model.on_write(m.ESDP, self._write_esdp)
        model.on_write(m.I2CCTL, self._write_i2c)
        model.on_write(m.MSCA, self._write_msca)

    def reset(self):
        low, high = self.eeprom.mac_words
        self._model.set(r.RAL[0], low)
        self._model.set(r.RAH[0], high | r.RAH.AV)
        self._write_esdp(0)

    # EEPROM and semaphores: 8.2.3.2, 8.2.3.4. No firmware contends for anything.

    def _write_eec(self, value):
        self._model.set(r.EEC, value & ~m.EEC_SIZE | r.EEC.PRESENT | r.EEC.AUTO_RD | m.EEC_SIZE.of(8))

    def _write_eerd(self, value):
        if value & r.EERD.START:
            word = self.eeprom.words[r.EERD.ADDR.get(value)]
            value = value & r.EERD.ADDR | r.EERD.DONE | r.EERD.DATA.of(word)
        self._model.set(r.EERD, value)

    def _read_swsm(self):
        value = self._model.get(m.SWSM)
        self._model.set(m.SWSM, value | m.SWSM.SMBI)
        return value

    # The SFP+ cage: SDP2 says that a module is in it, two pins lead to the module's EEPROM

    def _write_esdp(self, value):
        self._model.set(m.ESDP, value & ~m.ESDP.SDP2 | (m.ESDP.SDP2 if self.module else 0))

    def _write_i2c(self, value):
        clock, data = bool(value & m.I2CCTL.CLK_OUT), bool(value & m.I2CCTL.DATA_OUT)
        pulled = self.module.drive(clock, data) if self.module else True
        value &= ~(m.I2CCTL.CLK_IN | m.I2CCTL.DATA_IN)
        self._model.set(m.I2CCTL, value | (m.I2CCTL.CLK_IN if clock else 0)
                        | (m.I2CCTL.DATA_IN if data and pulled else 0))

    # MDIO, clause 45: an address cycle, then reads and writes there

    def _write_msca(self, value):
        if value & m.MSCA.COMMAND:
            where = m.MSCA.PORT.get(value), m.MSCA.DEVICE.get(value)
            operation, register = m.MSCA.OP.get(value), self._phy_address.get(where, 0)
            if operation == ADDRESS:
                self._phy_address[where] = m.MSCA.ADDRESS.get(value)
            elif operation == WRITE:
                if (*where, register) in self.phy:
                    self.phy[(*where, register)] = m.MSRWD.WRITE.get(self._model.get(m.MSRWD))
            else:
                word = self.phy.get((*where, register), NO_PHY)
                kept = self._model.get(m.MSRWD) & m.MSRWD.WRITE
                self._model.set(m.MSRWD, kept | m.MSRWD.READ.of(word))
                if operation == READ_AND_STEP:
                    self._phy_address[where] = register + 1 & 0xFFFF
        self._model.set(m.MSCA, value & ~m.MSCA.COMMAND)
