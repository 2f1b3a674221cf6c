//! A thread that is parked, and the one that goes on in its place.
//!
//! What is done here with a stack that two tasks could reach is written in assembler, since compiled code may use the
//! stack wherever it likes. The rule: a task that has published its stack pointer in its [`Slot`] touches the stack no more
//! until it reads a stack pointer from there. So at any time one task at most uses it.

use std::arch::asm;
use std::arch::global_asm;
use std::mem::offset_of;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::kernel::Told;

/// Of [`Slot::state`]: the slot is nobody's, or its thread has gone on.
pub(crate) const FREE: u32 = 0;
/// The thread is parked.
pub(crate) const PARKED: u32 = 1;
/// The thread cannot be parked: the kernel does not say where its number is kept.
pub(crate) const CANNOT: u32 = 2;
/// The thread that is to go on in its place stands ready.
pub(crate) const READY: u32 = 3;
/// No process could be made.
pub(crate) const FAILED: u32 = 4;

/// The thread was sent its signal.
pub(crate) const INVITED: u32 = 5;
/// The thread has taken its signal, and is about to park.
pub(crate) const COMING: u32 = 6;

/// Of [`Slot::command`] and [`Slot::gate`]: wait.
const WAIT: u32 = 0;
/// Go on.
pub(crate) const GO: u32 = 1;
/// Of [`Slot::gate`]: end.
pub(crate) const END: u32 = 2;

/// What is known of a thread that steps aside.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Slot {
    /// Where its stack ends, with its registers on it.
    stack: AtomicUsize,
    /// Its thread pointer.
    thread_pointer: AtomicUsize,
    /// Where its number is kept, which the kernel clears when it ends, so that it can be joined.
    tid_address: AtomicUsize,
    /// How far it is.
    pub(crate) state: AtomicU32,
    /// What the thread is to do.
    pub(crate) command: AtomicU32,
    /// What the thread in its place is to do.
    pub(crate) gate: AtomicU32,
    /// What the kernel clears in place of its number when the thread ends that is parked.
    cleared: AtomicU32,
    /// Why no process could be made: a negative errno.
    errno: AtomicI32,
    /// The thread's number; 0 if the slot is nobody's.
    pub(crate) tid: AtomicI32,
    /// Number of the process that the thread's copy is in; 0 if none was made. The kernel writes it before the copy runs.
    copy: AtomicI32,
}

impl Slot {
    pub(crate) const fn new() -> Self {
        Self {
            stack: AtomicUsize::new(0),
            thread_pointer: AtomicUsize::new(0),
            tid_address: AtomicUsize::new(0),
            state: AtomicU32::new(FREE),
            command: AtomicU32::new(WAIT),
            gate: AtomicU32::new(WAIT),
            cleared: AtomicU32::new(0),
            errno: AtomicI32::new(0),
            tid: AtomicI32::new(0),
            copy: AtomicI32::new(0),
        }
    }

    /// May it be [given](Self::give) to a thread?
    pub(crate) fn is_free(&self) -> bool {
        matches!(self.state.load(Ordering::Acquire), FREE | CANNOT)
    }

    /// Makes it a slot for this thread.
    pub(crate) fn give(&self, tid: i32) {
        self.command.store(WAIT, Ordering::Relaxed);
        self.gate.store(WAIT, Ordering::Relaxed);
        self.copy.store(0, Ordering::Relaxed);
        // Unless somebody says why, who was to make the copy was killed before.
        self.errno.store(-libc::EINTR, Ordering::Relaxed);
        self.tid.store(tid, Ordering::Relaxed);
        self.state.store(INVITED, Ordering::Release);
    }

    /// The thread with this number comes, if the slot is its own. It does so once.
    pub(crate) fn take(&self, tid: i32) -> bool {
        self.tid.load(Ordering::Relaxed) == tid && self.turn(INVITED, COMING)
    }

    /// The thread is not awaited any more. False if it has come.
    pub(crate) fn withdraw(&self) -> bool {
        self.turn(INVITED, FREE)
    }

    fn turn(&self, from: u32, to: u32) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Why there is no process.
    pub(crate) fn error(&self) -> std::io::Error {
        std::io::Error::from_raw_os_error(-self.errno.load(Ordering::Acquire))
    }

    /// Waits until the state is another than `state`, or for so long.
    pub(crate) fn wait(&self, state: u32, patience: Duration) {
        wait(&self.state, state, patience);
    }

    /// Says what is to be done.
    pub(crate) fn say(word: &AtomicU32, what: u32) {
        word.store(what, Ordering::SeqCst);
        // SAFETY: the kernel wakes who waits at the address, and reads nothing but the word, which the borrow keeps.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), FUTEX_WAKE, i32::MAX) };
    }

    /// Has the calling thread, whose number is kept at the address that is found here, end without that being told to
    /// who waits for it.
    fn end_untold(&self) -> bool {
        let mut address = 0usize;
        // SAFETY: the kernel writes one word at the address given, which is a local's.
        if unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut address) } != 0 {
            return false;
        }
        self.tid_address.store(address, Ordering::Release);
        set_tid_address(self.cleared.as_ptr().addr());
        true
    }

    /// The calling thread goes on after all, and its end is told.
    fn end_told(&self) {
        let address = self.tid_address.load(Ordering::Acquire);
        set_tid_address(address);
        let number = std::ptr::with_exposed_provenance::<i32>(address);
        // SAFETY: that is where the C library keeps this very thread's number, as an int that it reads whenever it
        // likes, for as long as the thread lives; the kernel writes it the same way when a thread is made.
        let number = unsafe { AtomicI32::from_ptr(number.cast_mut()) };
        // SAFETY: gettid has no conditions.
        number.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// Parks the calling thread, from within a handler during which no signal comes. Returns in it when it is told to go
    /// on, or in the thread that goes on in its place.
    pub(crate) fn park(&self) {
        let thread_pointer = thread_pointer();
        self.thread_pointer.store(thread_pointer, Ordering::Release);
        if !self.end_untold() {
            return Self::say(&self.state, CANNOT);
        }
        let told = Told::take(thread_pointer);
        // SAFETY: the slot is never freed. No signal comes, so nothing uses the stack of a thread that is parked; what goes
        // on in its place has its registers, stack and thread-local storage, and it never runs again then.
        if unsafe { tideover_aside_park(self) } == 0 {
            self.end_told();
        }
        told.tell();
        Self::say(&self.state, FREE);
    }

    /// Makes the calling thread's copy in a process of its own, which shares the memory, and returns there: `Ok`. Returns
    /// in the calling thread only if that fails, or if the copy [comes back](Self::come_back). No signal may come.
    pub(crate) fn depart(&self) -> std::io::Result<()> {
        if !self.end_untold() {
            return Err(std::io::Error::last_os_error());
        }
        let address = self.tid_address.load(Ordering::Acquire);
        let told = Told::take(thread_pointer());
        // SAFETY: the slot is never freed; the address is where the C library keeps this thread's number, and lasts as long
        // as the thread, be it this task or its copy. No signal comes, so one of the two uses the stack at a time.
        let departed = unsafe { tideover_aside_depart(self, address) };
        told.tell();
        if departed == 1 {
            return Ok(());
        }
        self.end_told();
        Err(self.error())
    }

    /// Whether the thread has [departed](Self::depart) and the process that its copy is in has ended.
    pub(crate) fn copy_has_ended(&self) -> bool {
        if self.state.load(Ordering::Acquire) != PARKED {
            return false;
        }
        let number = std::ptr::with_exposed_provenance::<u32>(self.tid_address.load(Ordering::Acquire));
        // SAFETY: where the C library keeps the number of a thread, which lives: it is parked. The kernel writes the copy's
        // there when it makes it, and clears it when it ends, however it does.
        unsafe { AtomicU32::from_ptr(number.cast_mut()) }.load(Ordering::Acquire) == 0
    }

    /// The copy that [departed](Self::depart) ends, with its process, and the thread that it came from goes on, with this
    /// error. No other thread of this process may have been let go.
    pub(crate) fn come_back(&self, error: &std::io::Error) {
        self.errno.store(-error.raw_os_error().unwrap_or(libc::EAGAIN), Ordering::Release);
        // Else the kernel could clear the number when the other task has written its own there.
        self.end_untold();
        let told = Told::take(thread_pointer());
        // SAFETY: the slot is never freed, and the thread that it is of is parked in `depart`. It goes on from here with
        // these registers and this stack, and this task touches neither again.
        unsafe { tideover_aside_come_back(self) };
        told.tell();
        self.end_told();
    }

    /// Makes the thread that goes on in the place of one that is parked, in the calling thread's process, and gives its
    /// number. It waits at the slot's gate.
    pub(crate) fn replace(&self) -> std::io::Result<i32> {
        let address = self.tid_address.load(Ordering::Acquire);
        let stack = self.stack.load(Ordering::Acquire);
        let thread_pointer = self.thread_pointer.load(Ordering::Acquire);
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_CHILD_SETTID
            | libc::CLONE_CHILD_CLEARTID;
        // SAFETY: the slot is never freed. The thread that it is of is parked, so that its stack and its thread-local storage
        // are used by nobody, and it does not go on before the new one has ended: see `go`. The address is where the C
        // library keeps that thread's number.
        let tid =
            unsafe { tideover_aside_replace(self, flags.cast_unsigned(), stack, address, thread_pointer) };
        match i32::try_from(tid) {
            Ok(tid) if tid > 0 => Ok(tid),
            Ok(errno) => Err(std::io::Error::from_raw_os_error(-errno)),
            Err(_) => Err(std::io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    /// Waits until the thread in the place of the one that is parked has ended, which was told to.
    pub(crate) fn await_end(&self) {
        let number = std::ptr::with_exposed_provenance::<u32>(self.tid_address.load(Ordering::Acquire));
        // SAFETY: where the C library keeps a thread's number, which lives: it is parked. The kernel clears it when the
        // one in its place ends.
        let number = unsafe { AtomicU32::from_ptr(number.cast_mut()) };
        loop {
            match number.load(Ordering::Acquire) {
                0 => return,
                tid => wait(number, tid, Duration::from_millis(10)),
            }
        }
    }
}

fn thread_pointer() -> usize {
    let pointer: usize;
    // SAFETY: on x86-64 Linux the word that the thread pointer points to is that pointer itself.
    unsafe { asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// Waits until a word is another, or for so long, or a little less.
pub(crate) fn wait(word: &AtomicU32, is: u32, patience: Duration) {
    let span = libc::timespec {
        tv_sec: libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    // SAFETY: the kernel reads the word, which the borrow keeps, and the time, which is a local. The kernel wakes who
    // waits for a thread's end as shared waiters, so this has to be one.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), FUTEX_WAIT, is, &raw const span) };
}

fn set_tid_address(address: usize) {
    // SAFETY: the kernel keeps the address, and writes an int there when this task ends. It is that of a static, or the
    // one that the C library gave.
    unsafe { libc::syscall(libc::SYS_set_tid_address, address) };
}

const PR_GET_TID_ADDRESS: libc::c_int = 40;
const FUTEX_WAIT: i32 = 0;
const FUTEX_WAKE: i32 = 1;
const WALL: i32 = 0x4000_0000;
const DEPART: i32 = libc::CLONE_VM | libc::CLONE_VFORK;
const ASIDE: i32 =
    libc::CLONE_VM | libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID;

unsafe extern "C" {
    /// Publishes the stack and waits. 0 in the same task, 1 in another.
    fn tideover_aside_park(slot: &Slot) -> u32;
    /// Makes a process by way of another, which ends, so that it is nobody's child. 1 there. 0 here: see the slot's error.
    fn tideover_aside_depart(slot: &Slot, tid_address: usize) -> u32;
    /// Gives the stack back and ends the process. Returns in the other.
    fn tideover_aside_come_back(slot: &Slot);
    /// Makes the thread in the place of one that is parked. Its number, or a negative errno.
    fn tideover_aside_replace(
        slot: &Slot,
        flags: u32,
        stack: usize,
        tid_address: usize,
        thread_pointer: usize,
    ) -> i64;
}

// Registers: rbx holds the slot throughout. A system call changes rax, rcx and r11 alone.
global_asm!(
    r#"
    .macro tideover_save
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        mov rbx, rdi
    .endm

    .macro tideover_restore result
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        mov eax, \result
        ret
    .endm

    .macro tideover_wake offset
        lea rdi, [rbx + \offset]
        mov esi, {wake}
        mov edx, 0x7fffffff
        mov eax, {sys_futex}
        syscall
    .endm

    .macro tideover_await offset
    771:
        cmp dword ptr [rbx + \offset], 0
        jne 772f
        lea rdi, [rbx + \offset]
        mov esi, {wait}
        xor edx, edx
        xor r10d, r10d
        mov eax, {sys_futex}
        syscall
        jmp 771b
    772:
    .endm

    .pushsection .text.tideover_aside, "ax", @progbits

    .globl tideover_aside_park
    .hidden tideover_aside_park
    .type tideover_aside_park, @function
tideover_aside_park:
    tideover_save
    mov [rbx + {stack}], rsp
    mov dword ptr [rbx + {state}], {parked}
    tideover_wake {state}
tideover_aside_stay:
    tideover_await {command}
    mov rsp, [rbx + {stack}]
    tideover_restore 0
    .size tideover_aside_park, . - tideover_aside_park

    .globl tideover_aside_depart
    .hidden tideover_aside_depart
    .type tideover_aside_depart, @function
tideover_aside_depart:
    tideover_save
    mov r12, rsi
    mov [rbx + {stack}], rsp
    mov edi, {depart}
    xor esi, esi
    xor edx, edx
    xor r10d, r10d
    xor r8d, r8d
    mov eax, {sys_clone}
    syscall
    test eax, eax
    jz 2f
    js 4f
    mov edi, eax
    xor esi, esi
    mov edx, {wall}
    xor r10d, r10d
    mov eax, {sys_wait4}
    syscall
    cmp dword ptr [rbx + {state}], {failed}
    je 6f
    cmp dword ptr [rbx + {copy}], 0
    je 6f
    mov dword ptr [rbx + {state}], {parked}
    tideover_wake {state}
    jmp tideover_aside_stay
6:
    tideover_restore 0
2:
    mov edi, {aside}
    xor esi, esi
    lea rdx, [rbx + {copy}]
    mov r10, r12
    xor r8d, r8d
    mov eax, {sys_clone}
    syscall
    test eax, eax
    jz 3f
    jns 5f
    mov [rbx + {errno}], eax
    mov dword ptr [rbx + {state}], {failed}
5:
    xor edi, edi
    mov eax, {sys_exit_group}
    syscall
    ud2
3:
    tideover_restore 1
4:
    mov [rbx + {errno}], eax
    tideover_restore 0
    .size tideover_aside_depart, . - tideover_aside_depart

    .globl tideover_aside_come_back
    .hidden tideover_aside_come_back
    .type tideover_aside_come_back, @function
tideover_aside_come_back:
    tideover_save
    mov [rbx + {stack}], rsp
    mov dword ptr [rbx + {command}], {go}
    tideover_wake {command}
    xor edi, edi
    mov eax, {sys_exit_group}
    syscall
    ud2
    .size tideover_aside_come_back, . - tideover_aside_come_back

    .globl tideover_aside_replace
    .hidden tideover_aside_replace
    .type tideover_aside_replace, @function
tideover_aside_replace:
    push rbx
    mov rbx, rdi
    mov edi, esi
    mov rsi, rdx
    xor edx, edx
    mov r10, rcx
    mov eax, {sys_clone}
    syscall
    test rax, rax
    jz 2f
    pop rbx
    ret
2:
    mov dword ptr [rbx + {state}], {ready}
    tideover_wake {state}
    tideover_await {gate}
    cmp dword ptr [rbx + {gate}], {end}
    je 3f
    tideover_restore 1
3:
    xor edi, edi
    mov eax, {sys_exit}
    syscall
    ud2
    .size tideover_aside_replace, . - tideover_aside_replace

    .popsection
    "#,
    stack = const offset_of!(Slot, stack),
    state = const offset_of!(Slot, state),
    command = const offset_of!(Slot, command),
    gate = const offset_of!(Slot, gate),
    errno = const offset_of!(Slot, errno),
    copy = const offset_of!(Slot, copy),
    parked = const PARKED,
    ready = const READY,
    failed = const FAILED,
    go = const GO,
    end = const END,
    wait = const FUTEX_WAIT,
    wake = const FUTEX_WAKE,
    wall = const WALL,
    depart = const DEPART,
    aside = const ASIDE,
    sys_futex = const libc::SYS_futex,
    sys_clone = const libc::SYS_clone,
    sys_wait4 = const libc::SYS_wait4,
    sys_exit = const libc::SYS_exit,
    sys_exit_group = const libc::SYS_exit_group,
);
