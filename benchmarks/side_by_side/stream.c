/* Reads memory as fast as the cores can, and prints {"gbs": ...}: stream BYTES THREADS TIMES
   Half of the passes ask for lines ahead, which helps on some machines; the fastest one counts. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define LANES 64 /* floats at a time: enough independent sums for any vector width */
#define AHEAD 1024

typedef struct {
  const float *values;
  size_t count;
  int ahead;
  float sum;
} Part;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *add(void *argument) {
  Part *part = argument;
  float sums[LANES] = {0};
  for (size_t i = 0; i + LANES <= part->count; i += LANES) {
    if (part->ahead)
      for (int k = 0; k < LANES; k += 16) __builtin_prefetch(part->values + i + k + AHEAD);
    for (int k = 0; k < LANES; k++) sums[k] += part->values[i + k];
  }
  part->sum = 0;
  for (int k = 0; k < LANES; k++) part->sum += sums[k];
  return NULL;
}

int main(int count, char **words) {
  if (count != 4) return 2;
  size_t bytes = strtoull(words[1], NULL, 10), values = bytes / sizeof(float);
  int threads = atoi(words[2]), times = atoi(words[3]);
  float *array = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (array == MAP_FAILED || threads < 1) return 1;
#ifdef MADV_HUGEPAGE
  madvise(array, bytes, MADV_HUGEPAGE);
#endif
  for (size_t i = 0; i < values; i++) array[i] = 1e-6f * (i & 255);
  Part *parts = calloc(threads, sizeof(Part));
  pthread_t *ids = calloc(threads, sizeof(pthread_t));
  double best = 1e30;
  volatile float sink = 0;
  for (int pass = 0; pass < 2 * times; pass++) {
    double start = now();
    for (int t = 0; t < threads; t++) {
      size_t share = values / threads;
      parts[t] = (Part){array + t * share, share, pass % 2, 0};
      if (pthread_create(&ids[t], NULL, add, &parts[t])) return 1;
    }
    for (int t = 0; t < threads; t++) {
      pthread_join(ids[t], NULL);
      sink += parts[t].sum;
    }
    double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  printf("{\"gbs\": %.3f}\n", bytes / best / 1e9);
  return 0;
}
