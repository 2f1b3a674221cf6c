//! What a thread has told the kernel about its own memory, which the kernel reads and writes there by itself.
//!
//! A thread that is parked takes it back: the memory is that of the one that goes on in its place, and goes away with that
//! one, while the kernel would still write to it whenever the parked one is woken (as by SIGCONT), or ends.

use std::ptr;
use std::sync::atomic::AtomicIsize;
use std::sync::atomic::Ordering;

/// Where the C library has registered a thread's restartable sequences, from its thread pointer on; 0: nowhere.
static RSEQ_OFFSET: AtomicIsize = AtomicIsize::new(0);

const UNREGISTER: libc::c_int = 1;
/// What stands before the code to which the kernel may jump, on x86: the C library's and everybody's.
const SIGNATURE: u32 = 0x5305_3053;
const AT_RSEQ_FEATURE_SIZE: libc::c_ulong = 27;
const AT_RSEQ_ALIGN: libc::c_ulong = 28;
/// Bytes of `struct robust_list_head`.
const HEAD_BYTES: usize = 24;

/// Asks the C library, once: it cannot be asked in a handler.
pub(crate) fn learn() {
    // SAFETY: both symbols are the C library's, if it has them: a `ptrdiff_t` and an `unsigned int` that never change.
    let (offset, size) = unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        (offset.as_ref(), size.as_ref())
    };
    if let (Some(offset), Some(1..)) = (offset, size) {
        RSEQ_OFFSET.store(*offset, Ordering::Release);
    }
}

/// What was taken back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told {
    robust_list: usize,
    rseq: Option<(usize, u32)>,
}

impl Told {
    /// Takes back what the calling thread, which has this thread pointer, has told.
    pub(crate) fn take(thread_pointer: usize) -> Self {
        let (mut robust_list, mut bytes) = (0usize, 0usize);
        // SAFETY: the kernel writes the two words given, which are locals.
        let got =
            unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut robust_list, &raw mut bytes) };
        if got != 0 || bytes != HEAD_BYTES {
            robust_list = 0;
        }
        set_robust_list(0);
        let offset = RSEQ_OFFSET.load(Ordering::Acquire);
        let area = thread_pointer.wrapping_add_signed(offset);
        let rseq = [32, rseq_bytes()].into_iter().find(|bytes| offset != 0 && rseq(area, *bytes, UNREGISTER));
        Self { robust_list, rseq: rseq.map(|bytes| (area, bytes)) }
    }

    /// Tells it for the calling thread, whose memory it is.
    pub(crate) fn tell(self) {
        set_robust_list(self.robust_list);
        if let Some((area, bytes)) = self.rseq {
            rseq(area, bytes, 0);
        }
    }
}

/// How long an area is on a kernel that wants more than 32 bytes, as the C library reckons.
fn rseq_bytes() -> u32 {
    // SAFETY: getauxval has no conditions.
    let (size, align) = unsafe { (libc::getauxval(AT_RSEQ_FEATURE_SIZE), libc::getauxval(AT_RSEQ_ALIGN)) };
    u32::try_from(size.max(32).next_multiple_of(align.max(32))).unwrap_or(32)
}

fn rseq(area: usize, bytes: u32, flags: libc::c_int) -> bool {
    // SAFETY: the kernel compares the address with the one registered, or registers it: the C library's area for this
    // very thread, which lasts as long as the thread, and which the kernel writes for it the same way.
    unsafe { libc::syscall(libc::SYS_rseq, area, bytes, flags, SIGNATURE) == 0 }
}

fn set_robust_list(head: usize) {
    // SAFETY: the kernel keeps the address of the list, to walk it when this task ends: none, or the one that the C
    // library had given for this very thread.
    unsafe { libc::syscall(libc::SYS_set_robust_list, ptr::with_exposed_provenance::<u8>(head), HEAD_BYTES) };
}
