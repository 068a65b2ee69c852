package dev.polymesh.shop;

import org.springframework.beans.factory.annotation.Value;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;
import org.springframework.web.bind.annotation.RestController;

/** The inventory: the service that the tutorial moves. */
@SpringBootApplication
@RestController
public class InventoryService {
    private final String place;

    InventoryService(@Value("${inventory.place}") String place) {
        this.place = place;
    }

    public static void main(String[] args) {
        SpringApplication.run(InventoryService.class, args);
    }

    record Stock(String item, int count, String servedBy) {}

    /** Made up of the name, so that every instance has the same. */
    @GetMapping("/stock/{item}")
    Stock stock(@PathVariable String item) {
        return new Stock(item, Math.floorMod(item.hashCode(), 100), place);
    }
}
