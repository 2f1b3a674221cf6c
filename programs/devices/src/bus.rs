//! What vCPUs call when they leave KVM for a port or an address without memory.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use thiserror::Error;

/// What answers at some ports.
///
/// Several vCPUs may call at once. `data` holds what one exit carries: one access of 1, 2 or 4 bytes, or several
/// accesses to the same port by a repeated string instruction, one behind the other. Which of them KVM does not say; a device
/// whose registers are bytes takes each byte as an access to `offset`.
pub trait PortDevice: Send + Sync {
    /// The guest reads `data.len()` bytes from the port at `offset` from the first. `data` holds ones.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// The guest writes to the port at `offset` from the first.
    fn write(&self, offset: u16, data: &[u8]);
}

/// What answers at some guest-physical addresses.
///
/// Several vCPUs may call at once. An access has 1 to 8 bytes.
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the window's first byte. `data` holds ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` from the window's first byte.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why something does not get its place on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BusError {
    /// It would have no place, or one beyond the last.
    #[error("{len:#x} places from {first:#x} on are none of the bus")]
    Range {
        /// First port or address.
        first: u64,
        /// How many.
        len: u64,
    },
    /// Some of it is another's.
    #[error("{len:#x} places from {first:#x} on overlap those of another device, from {other:#x} on")]
    Overlap {
        /// First port or address.
        first: u64,
        /// How many.
        len: u64,
        /// The other's first.
        other: u64,
    },
}

/// Devices by the last place that each has.
struct Places<D: ?Sized>(BTreeMap<u64, (u64, Arc<D>)>);

impl<D: ?Sized> Default for Places<D> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<D: ?Sized> Places<D> {
    fn insert(&mut self, first: u64, len: u64, limit: u64, device: Arc<D>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|more| first.checked_add(more));
        let last = last.filter(|last| *last <= limit).ok_or(BusError::Range { first, len })?;
        if let Some((_, (other, _))) = self.0.range(first..).next()
            && *other <= last
        {
            return Err(BusError::Overlap { first, len, other: *other });
        }
        self.0.insert(last, (first, device));
        Ok(())
    }

    /// The device that has all of these places, and the first one's offset in it.
    fn find(&self, places: RangeInclusive<u64>) -> Option<(&D, u64)> {
        let (last, (first, device)) = self.0.range(places.start()..).next()?;
        let offset = places.start().checked_sub(*first)?;
        (places.end() <= last).then_some((&**device, offset))
    }
}

/// Ports and addresses, and who answers there. Filled once, then shared by all vCPUs.
///
/// What nobody answers reads as ones, and a write to it has no effect, as on a PC. That goes also for an access that
/// lies only partly in a device's addresses. To ports it belongs by the first of them: a dword to 0xCF8
/// is no write to 0xCF9.
#[derive(Default)]
pub struct Bus {
    ports: Places<dyn PortDevice>,
    addresses: Places<dyn MmioDevice>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bus({} at ports, {} at addresses)", self.ports.0.len(), self.addresses.0.len())
    }
}

impl Bus {
    /// A bus with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `len` ports from `first` on.
    ///
    /// # Errors
    /// [`BusError`]
    pub fn at_ports(&mut self, first: u16, len: u16, device: Arc<dyn PortDevice>) -> Result<(), BusError> {
        self.ports.insert(first.into(), len.into(), u16::MAX.into(), device)
    }

    /// Puts a device at `len` bytes of guest-physical addresses from `first` on.
    ///
    /// # Errors
    /// [`BusError`]
    pub fn at_addresses(
        &mut self,
        first: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.addresses.insert(first, len, u64::MAX, device)
    }

    /// `KVM_EXIT_IO`, in. True if some device answers there.
    pub fn port_in(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.port(port).map(|(device, offset)| device.read(offset, data)).is_some()
    }

    /// `KVM_EXIT_IO`, out. True if some device takes it.
    pub fn port_out(&self, port: u16, data: &[u8]) -> bool {
        self.port(port).map(|(device, offset)| device.write(offset, data)).is_some()
    }

    fn port(&self, port: u16) -> Option<(&dyn PortDevice, u16)> {
        let (device, offset) = self.ports.find(port.into()..=port.into())?;
        Some((device, u16::try_from(offset).ok()?))
    }

    /// `KVM_EXIT_MMIO`, read. True if some device answers there.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.address(address, data.len()).map(|(device, offset)| device.read(offset, data)).is_some()
    }

    /// `KVM_EXIT_MMIO`, write. True if some device takes it.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        self.address(address, data.len()).map(|(device, offset)| device.write(offset, data)).is_some()
    }

    fn address(&self, address: u64, len: usize) -> Option<(&dyn MmioDevice, u64)> {
        let more = u64::try_from(len).ok()?.checked_sub(1)?;
        self.addresses.find(address..=address.checked_add(more)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers with its offset, and remembers what was written.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    impl PortDevice for Echo {
        fn read(&self, offset: u16, data: &mut [u8]) {
            MmioDevice::read(self, offset.into(), data);
        }

        fn write(&self, offset: u16, data: &[u8]) {
            MmioDevice::write(self, offset.into(), data);
        }
    }

    #[test]
    fn an_access_reaches_the_device_whose_it_is() {
        let (echo, other) = (Arc::new(Echo::default()), Arc::new(Echo::default()));
        let mut bus = Bus::new();
        bus.at_ports(0x3f8, 8, echo.clone()).unwrap();
        bus.at_ports(0x400, 1, other.clone()).unwrap();
        bus.at_addresses(0xd000_0000, 0x1000, echo.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.port_in(0x3fa, &mut data));
        assert_eq!(data, [2, 2]);
        assert!(bus.port_out(0x400, &[7]));
        assert_eq!(*other.0.lock().unwrap(), [(0, vec![7])]);
        assert!(bus.mmio_read(0xd000_00fe, &mut data));
        assert_eq!(data, [0xfe, 0xfe]);
        assert!(bus.mmio_write(0xd000_0ff8, &[1; 8]));
        assert_eq!(*echo.0.lock().unwrap(), [(0xff8, vec![1; 8])]);
    }

    #[test]
    fn what_is_nobodys_reads_as_ones_and_takes_nothing() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.at_ports(0xcf9, 1, echo.clone()).unwrap();
        bus.at_addresses(0x1000, 0x1000, echo.clone()).unwrap();
        let mut data = [0; 4];
        assert!(!bus.port_in(0xcf8, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.port_out(0xcf8, &[0xff; 4]), "a dword to 0xcf8 is no write to 0xcf9");
        for address in [0xffd, 0x1ffd, 0x2000, u64::MAX - 1] {
            data.fill(0);
            assert!(!bus.mmio_read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.mmio_write(address, &data));
        }
        assert!(!bus.mmio_write(0x1000, &[]));
        assert!(echo.0.lock().unwrap().is_empty());
    }

    #[test]
    fn no_place_is_given_twice() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.at_ports(8, 8, echo.clone()).unwrap();
        for (first, len) in [(0, 9), (8, 8), (9, 1), (15, 4), (0, 100)] {
            let refused = BusError::Overlap { first: first.into(), len: len.into(), other: 8 };
            assert_eq!(bus.at_ports(first, len, echo.clone()), Err(refused));
        }
        for (first, len) in [(0, 0), (0xffff, 2)] {
            let refused = BusError::Range { first: first.into(), len: len.into() };
            assert_eq!(bus.at_ports(first, len, echo.clone()), Err(refused));
        }
        bus.at_ports(0, 8, echo.clone()).unwrap();
        bus.at_ports(16, 1, echo.clone()).unwrap();
        assert!(bus.at_addresses(u64::MAX, 2, echo).is_err());
    }
}
