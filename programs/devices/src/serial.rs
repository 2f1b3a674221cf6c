//! A serial line: a 16550A as vm-superio makes it, with an interrupt and with input that waits.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use abi::record::Format;
use thiserror::Error;
use vm_superio::SerialState;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;

use crate::bus::PortDevice;
use crate::device::Device;
use crate::device::ResumeError;
use crate::interrupt::InterruptLine;
use crate::state::Reader;
use crate::state::StateError;

/// Bytes of the device's own buffer for input.
const FIFO_BYTES: usize = 64;
/// Bytes of input that may wait to get there.
const BACKLOG_BYTES: usize = 64 << 10;

/// Registers at which a read may take back the reason for an interrupt: data, and the interrupt's identification.
const DATA: u8 = 0;
const IDENTIFICATION: u8 = 2;
/// In the identification: no interrupt is pending.
const NONE_PENDING: u8 = 1;
/// The interrupts that there are: transmitter empty, data received.
const REASONS: u8 = 6;
/// Bits of the enable register.
const ENABLES: u8 = 0xf;
/// In the line status: there is data.
const DATA_READY: u8 = 1;
/// Always set in the line status: the transmitter is empty.
const TRANSMITTER_EMPTY: u8 = 0x60;

pub(crate) const FORMAT: Format = Format {
    compatible: "tideover-serial-v1",
    kind: *b"DSER",
    version: 1,
    oldest: 1,
    max_payload_bytes: 128 << 10,
};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo_bytes: u8,
    reserved: [u8; 2],
    backlog_bytes: U32,
}

/// Why a serial line did not do what it was to.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SerialError {
    /// The guest's output has no place to go to; these bytes are lost, and the guest does not know.
    #[error("the guest's output is lost")]
    Output(#[source] io::Error),
    /// The interrupt line could not be raised.
    #[error("the interrupt cannot be raised")]
    Interrupt(#[source] io::Error),
}

/// Raises the line, but not while the device is paused: there is another VM to come that would not see it.
#[derive(Clone)]
struct Pin {
    line: Arc<dyn InterruptLine>,
    live: Arc<AtomicBool>,
}

impl Trigger for Pin {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.live.load(Ordering::SeqCst) { self.line.raise() } else { Ok(()) }
    }
}

#[derive(Clone)]
struct Sink(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

type Uart = vm_superio::Serial<Pin, NoEvents, Sink>;

struct Inner {
    uart: Uart,
    backlog: VecDeque<u8>,
    fault: Option<SerialError>,
}

/// A serial line. The guest's output goes to a sink as it comes, on the thread of the vCPU: what was written is out
/// and is not part of the state. Input waits here, and is.
pub struct Serial {
    name: String,
    pin: Pin,
    sink: Sink,
    inner: Mutex<Inner>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Serial {
    /// First of the ports of a PC's first serial line.
    pub const COM1: u16 = 0x3f8;
    /// How many ports it has.
    pub const PORTS: u16 = 8;
    /// The interrupt of the first serial line.
    pub const COM1_INTERRUPT: u32 = 4;

    /// A line whose output goes to `sink`, which is not to block: a vCPU waits for it.
    pub fn new(name: &str, line: Arc<dyn InterruptLine>, sink: Box<dyn Write + Send>) -> Arc<Self> {
        let pin = Pin { line, live: Arc::default() };
        let sink = Sink(Arc::new(Mutex::new(sink)));
        let uart = Uart::with_events(pin.clone(), NoEvents, sink.clone());
        let inner = Mutex::new(Inner { uart, backlog: VecDeque::new(), fault: None });
        Arc::new(Self { name: name.to_owned(), pin, sink, inner })
    }

    /// Gives the guest input. Returns how many of the bytes were taken: none while the device is paused, and not all
    /// if the guest reads too slowly. The rest remains the caller's.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut inner = self.inner();
        if !self.is_live() {
            return 0;
        }
        let room = BACKLOG_BYTES.saturating_sub(inner.backlog.len());
        let taken = bytes.len().min(room);
        inner.backlog.extend(bytes.iter().take(taken));
        self.refill(&mut inner);
        taken
    }

    /// What went wrong last, once.
    pub fn take_fault(&self) -> Option<SerialError> {
        self.inner().fault.take()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_live(&self) -> bool {
        self.pin.live.load(Ordering::SeqCst)
    }

    /// Moves waiting input to where the guest reads it.
    fn refill(&self, inner: &mut Inner) {
        while !inner.backlog.is_empty() {
            let len = inner.uart.fifo_capacity().min(inner.backlog.len());
            let bytes: Vec<u8> = inner.backlog.iter().copied().take(len).collect();
            // In loopback mode it takes nothing: the line is cut.
            match inner.uart.enqueue_raw_bytes(&bytes) {
                Ok(0) | Err(vm_superio::serial::Error::FullFifo) => return,
                Ok(taken) => drop(inner.backlog.drain(..taken)),
                Err(error) => {
                    // The bytes are in the buffer; it is the interrupt that failed.
                    inner.backlog.drain(..len);
                    inner.fault = fault(error);
                }
            }
        }
    }

    fn lower_if_idle(&self, inner: &mut Inner) {
        if inner.uart.state().interrupt_identification & NONE_PENDING != 0
            && let Err(error) = self.pin.line.lower()
        {
            inner.fault = Some(SerialError::Interrupt(error));
        }
    }
}

fn fault(error: vm_superio::serial::Error<io::Error>) -> Option<SerialError> {
    match error {
        vm_superio::serial::Error::Trigger(error) => Some(SerialError::Interrupt(error)),
        vm_superio::serial::Error::IOError(error) => Some(SerialError::Output(error)),
        vm_superio::serial::Error::FullFifo => None,
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut inner = self.inner();
        for byte in data {
            *byte = inner.uart.read(offset);
            if offset == DATA {
                self.refill(&mut inner);
            }
        }
        if offset == DATA || offset == IDENTIFICATION {
            self.lower_if_idle(&mut inner);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut inner = self.inner();
        for byte in data {
            if let Err(error) = inner.uart.write(offset, *byte) {
                inner.fault = fault(error);
            }
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> &'static str {
        FORMAT.compatible
    }

    fn pause(&self) {
        // Under the lock: an input that is being taken is taken before or not at all.
        let _inner = self.inner();
        self.pin.live.store(false, Ordering::SeqCst);
    }

    fn resume(&self) -> Result<(), ResumeError> {
        let inner = self.inner();
        self.pin.live.store(true, Ordering::SeqCst);
        let state = inner.uart.state();
        let is_pending = state.interrupt_identification & NONE_PENDING == 0;
        if is_pending && state.interrupt_enable & ENABLES != 0 {
            self.pin.line.raise().map_err(|source| ResumeError {
                device: self.name.clone(),
                what: "raise its interrupt",
                source,
            })?;
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let inner = self.inner();
        if self.is_live() {
            return Err(StateError::NotPaused { device: self.name.clone() });
        }
        let state = inner.uart.state();
        let wire = Wire {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            fifo_bytes: u8::try_from(state.in_buffer.len()).unwrap_or(u8::MAX),
            reserved: [0; 2],
            backlog_bytes: u32::try_from(inner.backlog.len()).unwrap_or(u32::MAX).into(),
        };
        let mut payload = wire.as_bytes().to_vec();
        payload.extend_from_slice(&state.in_buffer);
        payload.extend(&inner.backlog);
        Ok(FORMAT.encode(&payload))
    }

    fn load(&self, bytes: &[u8]) -> Result<(), StateError> {
        let mut inner = self.inner();
        if self.is_live() {
            return Err(StateError::NotPaused { device: self.name.clone() });
        }
        let (state, backlog) = decode(&self.name, bytes)?;
        // It refuses a longer buffer only, which `decode` has refused already; the pin is not live.
        let uart = Uart::from_state(&state, self.pin.clone(), NoEvents, self.sink.clone());
        let uart = uart.map_err(|_| StateError::Field {
            device: self.name.clone(),
            field: "fifo_bytes",
            found: u64::try_from(state.in_buffer.len()).unwrap_or(u64::MAX),
            why: "is refused",
        })?;
        *inner = Inner { uart, backlog: backlog.into(), fault: None };
        Ok(())
    }
}

fn decode(name: &str, bytes: &[u8]) -> Result<(SerialState, Vec<u8>), StateError> {
    let mut reader = Reader::new(name, &FORMAT, bytes)?;
    let wire: Wire = reader.take("registers")?;
    let fifo_bytes = usize::from(wire.fifo_bytes);
    let backlog_bytes = usize::try_from(wire.backlog_bytes.get()).unwrap_or(usize::MAX);
    let checks = [
        (wire.reserved == [0; 2], "reserved", u16::from_le_bytes(wire.reserved).into(), "is to be zero"),
        (fifo_bytes <= FIFO_BYTES, "fifo_bytes", wire.fifo_bytes.into(), "is over the limit"),
        (
            backlog_bytes <= BACKLOG_BYTES,
            "backlog_bytes",
            wire.backlog_bytes.get().into(),
            "is over the limit",
        ),
        (
            wire.interrupt_enable & !ENABLES == 0,
            "interrupt_enable",
            wire.interrupt_enable.into(),
            "names interrupts that there are not",
        ),
        (
            wire.interrupt_identification == NONE_PENDING
                || wire.interrupt_identification & REASONS != 0
                    && wire.interrupt_identification & !REASONS == 0,
            "interrupt_identification",
            wire.interrupt_identification.into(),
            "names no interrupt, or one that there is not",
        ),
        (
            wire.line_status & !DATA_READY == TRANSMITTER_EMPTY
                && (wire.line_status & DATA_READY != 0) == (fifo_bytes > 0),
            "line_status",
            wire.line_status.into(),
            "contradicts the buffer",
        ),
    ];
    for (good, field, found, why) in checks {
        reader.check(good, field, found, why)?;
    }
    let mut in_buffer = reader.rest("backlog", fifo_bytes + backlog_bytes)?;
    let backlog = in_buffer.split_off(fifo_bytes);
    let state = SerialState {
        baud_divisor_low: wire.baud_divisor_low,
        baud_divisor_high: wire.baud_divisor_high,
        interrupt_enable: wire.interrupt_enable,
        interrupt_identification: wire.interrupt_identification,
        line_control: wire.line_control,
        line_status: wire.line_status,
        modem_control: wire.modem_control,
        modem_status: wire.modem_status,
        scratch: wire.scratch,
        in_buffer,
    };
    Ok((state, backlog))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    use super::*;
    use crate::rig::CountedLine;
    use crate::rig::Output;

    struct Rig {
        serial: Arc<Serial>,
        line: Arc<CountedLine>,
        output: Output,
    }

    fn rig() -> Rig {
        let (line, output) = (Arc::new(CountedLine::default()), Output::default());
        let serial = Serial::new("com1", line.clone(), Box::new(output.clone()));
        Rig { serial, line, output }
    }

    impl Rig {
        fn successor(&self) -> Self {
            self.serial.pause();
            let state = self.serial.save().unwrap();
            let new = rig();
            new.serial.load(&state).unwrap();
            assert_eq!(new.serial.save().unwrap(), state);
            assert_eq!(new.line.raised(), 0, "the interrupt waits for the VM to be loaded");
            new
        }

        fn read(&self, offset: u16) -> u8 {
            let mut byte = [0];
            self.serial.read(offset, &mut byte);
            byte[0]
        }
    }

    #[test]
    fn output_goes_to_the_sink_byte_by_byte_and_is_not_repeated() {
        let old = rig();
        old.serial.resume().unwrap();
        old.serial.write(0, b"ab");
        assert_eq!(old.output.bytes(), b"ab");
        let new = old.successor();
        new.serial.resume().unwrap();
        new.serial.write(0, b"c");
        assert_eq!(new.output.bytes(), b"c");
    }

    #[test]
    fn input_gets_to_the_guest_in_order_over_an_update_and_more_of_it_than_the_buffer_holds() {
        let old = rig();
        old.serial.resume().unwrap();
        old.serial.write(1, &[1]);
        let input: Vec<u8> = (0..200).collect();
        assert_eq!(old.serial.push_input(&input), 200);
        assert_eq!(old.line.raised(), 1);
        let first: Vec<u8> = (0..50).map(|_| old.read(0)).collect();
        let new = old.successor();
        assert_eq!(old.serial.push_input(b"x"), 0, "paused");
        assert_eq!(new.serial.push_input(b"x"), 0, "not resumed yet");
        new.serial.resume().unwrap();
        let mut read = first;
        while new.read(5) & DATA_READY != 0 {
            read.push(new.read(0));
        }
        assert_eq!(read, input);
    }

    #[test]
    fn an_interrupt_that_the_guest_has_not_seen_is_raised_again_and_a_seen_one_is_not() {
        let old = rig();
        old.serial.resume().unwrap();
        old.serial.write(1, &[1]);
        old.serial.push_input(b"a");
        let new = old.successor();
        new.serial.resume().unwrap();
        assert_eq!(new.line.raised(), 1);
        assert_eq!(new.read(2) & 0xf, 4, "data received");
        assert_eq!(new.line.lowered(), 1);
        let newer = new.successor();
        newer.serial.resume().unwrap();
        assert_eq!(newer.line.raised(), 0);
        assert_eq!(newer.read(0), b'a', "the data is there all the same");
    }

    #[test]
    fn a_slow_guest_leaves_the_rest_of_its_input_with_the_caller() {
        let rig = rig();
        rig.serial.resume().unwrap();
        assert_eq!(rig.serial.push_input(&[1; 100_000]), BACKLOG_BYTES);
        assert_eq!(rig.serial.push_input(&[2; 100_000]), FIFO_BYTES);
        assert_eq!(rig.serial.push_input(&[3]), 0);
        rig.serial.pause();
        rig.serial.load(&rig.serial.save().unwrap()).unwrap();
    }

    #[test]
    fn a_working_line_is_neither_saved_nor_loaded() {
        let rig = rig();
        let state = rig.serial.save().unwrap();
        rig.serial.resume().unwrap();
        assert!(matches!(rig.serial.save(), Err(StateError::NotPaused { .. })));
        assert!(matches!(rig.serial.load(&state), Err(StateError::NotPaused { .. })));
    }

    #[test]
    fn each_field_that_cannot_be_is_named() {
        let field = |change: fn(&mut Wire), more: usize| {
            let mut wire = Wire::new_zeroed();
            (wire.interrupt_identification, wire.line_status) = (1, 0x60);
            change(&mut wire);
            let mut payload = wire.as_bytes().to_vec();
            payload.extend(vec![0; more]);
            match rig().serial.load(&FORMAT.encode(&payload)) {
                Err(StateError::Field { field, .. } | StateError::Length { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(field(|wire| wire.fifo_bytes = 65, 65), "fifo_bytes");
        assert_eq!(field(|wire| wire.backlog_bytes = 65537.into(), 65537), "backlog_bytes");
        assert_eq!(field(|wire| wire.interrupt_enable = 0x10, 0), "interrupt_enable");
        assert_eq!(field(|wire| wire.interrupt_identification = 0, 0), "interrupt_identification");
        assert_eq!(field(|wire| wire.interrupt_identification = 3, 0), "interrupt_identification");
        assert_eq!(field(|wire| wire.line_status = 0x61, 0), "line_status");
        assert_eq!(field(|wire| wire.line_status = 0, 0), "line_status");
        assert_eq!(field(|wire| wire.backlog_bytes = 2.into(), 1), "backlog");
        assert_eq!(field(|_| (), 1), "backlog");
        assert_eq!(field(|wire| wire.reserved[1] = 1, 0), "reserved");
    }

    proptest! {
        #[test]
        fn no_state_that_is_loaded_panics_and_each_is_saved_as_it_was(
            mut payload in proptest::collection::vec(any::<u8>(), 16..200),
        ) {
            // Make it likely to be accepted.
            payload[2] &= ENABLES;
            payload[3] = if payload[3] & 1 == 0 { 1 } else { 6 };
            payload[9] &= 63;
            payload[10..16].fill(0);
            payload[5] = 0x60 | u8::from(payload[9] > 0);
            payload.truncate(16 + usize::from(payload[9]));
            let state = FORMAT.encode(&payload);
            let rig = rig();
            if rig.serial.load(&state).is_ok() {
                prop_assert_eq!(rig.serial.save().unwrap(), state);
                rig.serial.resume().unwrap();
                for offset in 0..8 {
                    rig.serial.write(offset, &[0x5a]);
                    rig.read(offset);
                }
            }
        }
    }
}
