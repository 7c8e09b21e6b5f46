/*
 * A 32-bit program without a library, so that it can be built where there is none for 32 bits:
 * gcc -m32 -nostdlib -static. At its gate like the others; then 211 getppid and 53 writes to a bad
 * descriptor.
 */
static long call(long number, long first, long second, long third)
{
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(number), "b"(first), "c"(second), "d"(third)
		     : "memory");
	return result;
}

void _start(void)
{
	char byte;
	int i;

	call(4, 1, (long)"ready\n", 6);
	call(3, 0, (long)&byte, 1);
	for (i = 0; i < 211; i++)
		call(64, 7, i, ~i);
	for (i = 0; i < 53; i++)
		call(4, -1, 0, i);
	call(4, 1, (long)"{}\n", 3);
	call(252, 0, 0, 0);
}
