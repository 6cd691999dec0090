// Collections of strings and objects, held until it is ended: `java Heap.java PROSE`. Says 'ready'.

import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.TreeMap;
import java.util.UUID;

public class Heap {
    record Line(int article, int count, double price) {}

    record Order(UUID id, String customer, Instant placed, List<Line> lines, String remark) {}

    static final int ORDERS = 150_000;
    static final int SENTENCES = 150_000;

    public static void main(String[] arguments) throws Exception {
        String prose = Files.readString(Path.of(arguments[0]));
        Random random = new Random(1);
        Map<UUID, Order> orders = new HashMap<>();
        Map<String, List<Order>> byCustomer = new TreeMap<>();
        for (int number = 0; number < ORDERS; number++) {
            Order order = order(random, prose);
            orders.put(order.id, order);
            byCustomer.computeIfAbsent(order.customer, name -> new ArrayList<>()).add(order);
        }
        List<String> sentences = new ArrayList<>();
        Map<String, Integer> counts = new HashMap<>();
        for (int number = 0; number < SENTENCES; number++) {
            String sentence = cut(random, prose, 20 + random.nextInt(200));
            sentences.add(sentence);
            for (String word : sentence.split("\\W+")) {
                counts.merge(word, 1, Integer::sum);
            }
        }
        double[] series = random.doubles(500_000).map(value -> Math.round(value * 1e4) / 1e2).toArray();
        long[] times = random.longs(500_000, 0, 86_400_000L).map(value -> value + 1_700_000_000_000L).sorted().toArray();
        System.out.println("ready");
        Thread.sleep(3_600_000);
        System.out.println(orders.size() + byCustomer.size() + sentences.size() + counts.size() + series[1] + times[1]);
    }

    static Order order(Random random, String prose) {
        List<Line> lines = new ArrayList<>();
        for (int left = random.nextInt(6); left >= 0; left--) {
            lines.add(new Line(random.nextInt(20_000), 1 + random.nextInt(5), random.nextInt(100_000) / 100.0));
        }
        UUID id = new UUID(random.nextLong(), random.nextLong());
        Instant placed = Instant.ofEpochSecond(1_700_000_000L + random.nextInt(10_000_000));
        String remark = random.nextInt(4) == 0 ? cut(random, prose, 10 + random.nextInt(80)) : "";
        return new Order(id, "customer-" + random.nextInt(20_000), placed, lines, remark);
    }

    static String cut(Random random, String prose, int length) {
        int at = random.nextInt(prose.length() - length);
        return prose.substring(at, at + length);
    }
}
