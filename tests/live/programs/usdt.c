/*
 * Hits USDT probes and functions a known number of times, with known arguments.
 *
 * The notes are written by hand, as <sys/sdt.h> would: so every form of argument occurs, whatever the
 * compiler would choose.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TIMES = 23, DEPTH = 7, NAP_NS = 1000000 };

/* counted up by the kernel while somebody listens */
#define SEMAPHORE(name) \
	volatile unsigned short name __attribute__((section(".probes"), used, visibility("hidden")))
SEMAPHORE(counted_semaphore) = 0;
SEMAPHORE(forms_semaphore) = 0;

int limit = 1234567;
/* beyond 32 bits, so that a wrong size shows */
long table[] = {0x1111111100000001, 0x2222222200000002, 0x3333333300000003, -4, 0x55555555ffff8005};

#define NOTE(label, semaphore, name, arguments)                                                       \
	".pushsection .note.stapsdt,\"\",\"note\"\n"                                                  \
	".balign 4\n"                                                                                 \
	".4byte 992f-991f, 994f-993f, 3\n"                                                            \
	"991: .asciz \"stapsdt\"\n"                                                                   \
	"992: .balign 4\n"                                                                            \
	"993: .8byte " label ", _.stapsdt.base, " semaphore "\n"                                      \
	".asciz \"scope_test\"\n"                                                                     \
	".asciz \"" name "\"\n"                                                                       \
	".asciz \"" arguments "\"\n"                                                                  \
	"994: .balign 4\n"                                                                            \
	".popsection\n"

asm(".pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n"
    ".weak _.stapsdt.base\n"
    ".hidden _.stapsdt.base\n"
    "_.stapsdt.base: .space 1\n"
    ".size _.stapsdt.base, 1\n"
    ".popsection\n");

/* Every form of argument that gcc and clang write; test_hits.py knows the values. */
asm(".text\n"
    ".type hit_forms, @function\n"
    "hit_forms:\n"
    "push %rbp\n"
    "mov %rsp, %rbp\n"
    "push %rbx\n"
    "sub $72, %rsp\n"
    "movl $-5, -20(%rbp)\n"
    "movabs $0x1122334455667788, %rax\n"
    "movabs $0xaabbccddeeff0011, %r11\n"
    "lea table(%rip), %rbx\n"
    "mov $2, %ecx\n"
    "forms_registers: nop\n"
    NOTE("forms_registers", "forms_semaphore", "registers",
	 "8@%rax 4@%eax -2@%ax 1@%ah -1@%al 8@%r11 4@%r11d -1@%r11b")
    "forms_memory: nop\n"
    NOTE("forms_memory", "forms_semaphore", "memory",
	 "-4@-20(%rbp) 8@(%rbx,%rcx,8) -2@8(%rbx,%rcx,8) -8@24(%rbx) 4@limit(%rip) 4@32+table(%rip) "
	 "-4@32+table(%rip) 2@-8(%rbx,%rcx,8)")
    "forms_others: nop\n"
    NOTE("forms_others", "forms_semaphore", "others", "-4@$-7 8@$7 1@$255 -1@$255 8@%xmm0 4@%fs:16 8@nowhere(%rip)")
    "add $72, %rsp\n"
    "pop %rbx\n"
    "pop %rbp\n"
    "ret\n"
    ".size hit_forms, .-hit_forms\n");
void hit_forms(void);

#define HIT(name, semaphore, arguments, ...) \
	asm volatile("990: nop\n" NOTE("990b", semaphore, name, arguments) : : __VA_ARGS__ : "memory")

__attribute__((noinline)) static void hit_text(const char *text, const char *other, long number)
{
	HIT("text", "0", "8@%[text] 8@%[other] -8@%[number]",
	    [text] "r"(text), [other] "r"(other), [number] "r"(number));
}

/* a pair of two places, one hit in each round */
__attribute__((noinline)) static void hit_both(int round)
{
	if (round % 2)
		HIT("both", "0", "-4@%k[round] -4@$1", [round] "r"(round));
	else
		HIT("both", "0", "-4@$0 -4@%k[round]", [round] "r"(round));
}

__attribute__((noinline)) int many(int a, const char *text, unsigned long c, void *d, short e,
				   signed char f, long g, unsigned h)
{
	asm volatile("" : : "r"(text), "r"(d), "r"(g) : "memory");
	return a + (int)c + e + f - (int)h;
}

static void nap(long nanoseconds)
{
	struct timespec time = {.tv_nsec = nanoseconds};

	nanosleep(&time, NULL);
}

__attribute__((noinline)) int fall(int depth)
{
	int result;

	nap(NAP_NS);
	result = depth ? -depth - fall(depth - 1) : 0;
	asm volatile("" : "+r"(result));
	return result;
}

__attribute__((noinline)) const char *name_of(int number)
{
	const char *name = number % 2 ? "odd" : NULL;

	asm volatile("" : "+r"(name));
	return name;
}

int main(void)
{
	char gate, longer[1000];
	int round, listened = 0, sum = 0;

	memset(longer, 'x', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = 0;
	puts("ready");
	fflush(stdout);
	if (read(0, &gate, 1) != 1)
		return 1;
	for (round = 0; round < TIMES; round++) {
		if (counted_semaphore) {
			listened++;
			HIT("counted", "counted_semaphore", "-4@%k[round]", [round] "r"(round));
		}
		if (forms_semaphore)
			hit_forms();
		hit_text(round ? "SELECT 'hunter2' FROM t WHERE n = 4711" : longer, round % 2 ? NULL : "caf\303\251",
			 -round);
		hit_both(round);
		sum += many(round - 11, "password", 1UL << 40, (void *)0xdeadbeef, -3, -1, -(1L << 40), 4000000000U);
		sum += name_of(round) != NULL;
	}
	sum += fall(DEPTH);
	printf("{\"listened\": %d, \"left\": %d, \"sum\": %d}\n", listened, counted_semaphore, sum);
	return 0;
}
